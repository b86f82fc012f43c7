"""Which experts did each token go to? `routes.parquet`, written and read a part at a time.

One row per token and routed layer; the layers of a token follow each other:

    token_id, next_token_id,      int32; the last two -1 where the next token belongs to another
    predicted_token_id            document
    position, sequence, document  int32: place in its sequence; number of the sequence in the text;
                                  number of the document in the sequence
    domain                        text, dictionary-encoded
    layer                         int16, number of the block
    experts, weights              K int16 (-1: none) and K float32, the largest K of any layer, as
                                  routers chose: before a capacity takes any back
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from moe.routing import stack_layers
from train.analysis_text import Reading
from train.packing import IGNORE, Batch

# A part of the file that is held in memory until it is written.
_ROWS = 1 << 17
_NUMBERS = (
    "token_id",
    "next_token_id",
    "predicted_token_id",
    "position",
    "sequence",
    "document",
)


def schema(top_k: int) -> pa.Schema:
    """Names and types of the columns, for K experts a token."""
    return pa.schema(
        [
            *((name, pa.int32()) for name in _NUMBERS),
            ("domain", pa.dictionary(pa.int32(), pa.string())),
            ("layer", pa.int16()),
            ("experts", pa.list_(pa.int16(), top_k)),
            ("weights", pa.list_(pa.float32(), top_k)),
        ]
    )


class RouteTable:
    """Writes the routes of batch after batch.

    Args:
        file: written from its beginning. domains: names, by their number in a batch.
        layers: numbers of the routed blocks. top_k: K.
    """

    def __init__(self, file: BinaryIO, domains: Sequence[str], layers: Sequence[int], top_k: int):
        self._schema, self._top_k = schema(top_k), top_k
        self._domains = pa.array(domains, pa.string())
        self._layers = np.asarray(layers, np.int16)
        self._writer = pq.ParquetWriter(file, self._schema, compression="zstd")
        self._waiting: list[pa.Table] = []
        self._sequences = 0

    def add(self, batch: Batch, reading: Reading) -> None:
        """Append the routes of one forward pass."""
        size, seq_len = batch.input_ids.shape
        num_layers = len(self._layers)
        labels = batch.labels.masked_fill(batch.labels == IGNORE, -1)
        sequences = torch.arange(self._sequences, self._sequences + size)
        by_token = (
            batch.input_ids,
            labels,
            reading.predicted.cpu(),
            torch.arange(seq_len).expand(size, -1),
            sequences.unsqueeze(-1).expand(-1, seq_len),
            batch.document_ids,
        )
        columns = [
            pa.array(np.repeat(values.flatten().numpy().astype(np.int32), num_layers))
            for values in by_token
        ]
        domains = batch.domain_ids.numpy().astype(np.int32).repeat(seq_len * num_layers)
        columns.append(pa.DictionaryArray.from_arrays(pa.array(domains), self._domains))
        columns.append(pa.array(np.tile(self._layers, size * seq_len)))
        experts = stack_layers([r.chosen_indices for r in reading.routings], 1)  # (T, L, K)
        weights = stack_layers([r.chosen_weights for r in reading.routings], 1, fill=0)
        for values, kind in ((experts, np.int16), (weights, np.float32)):
            flat = pa.array(values.flatten().cpu().numpy().astype(kind))
            columns.append(pa.FixedSizeListArray.from_arrays(flat, self._top_k))
        self._waiting.append(pa.Table.from_arrays(columns, schema=self._schema))
        self._sequences += size
        if sum(table.num_rows for table in self._waiting) >= _ROWS:
            self._flush()

    def close(self) -> None:
        """Write what is left, and the end of the file."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._waiting:
            table = pa.concat_tables(self._waiting)
            self._waiting = []
            # One row group: a token's layers are never cut apart.
            self._writer.write_table(table, row_group_size=table.num_rows)


class RouteBlock(NamedTuple):
    """Some consecutive tokens of a table: token_id, next_token_id, predicted_token_id (T,) int32;
    experts (T, L, K) int16."""

    token_id: np.ndarray
    next_token_id: np.ndarray
    predicted_token_id: np.ndarray
    experts: np.ndarray


def read_blocks(path: Path, num_layers: int) -> Iterator[RouteBlock]:
    """The tokens of a table and their experts, a part at a time."""
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, [*RouteBlock._fields])
            ids = [table[name].to_numpy()[::num_layers] for name in RouteBlock._fields[:3]]
            experts = table["experts"].combine_chunks()
            flat = experts.flatten().to_numpy()
            routes = flat.reshape(len(ids[0]), num_layers, -1)
            yield RouteBlock(ids[0], ids[1], ids[2], routes)
