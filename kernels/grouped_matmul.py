"""One matmul per expert over contiguous rows.

    out[r] = weight[e] @ rows[r],   expert_offsets[e] <= r < expert_offsets[e + 1]

Rows behind the last offset are unused: never read, and 0 in the output.
"""

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.bench import Case, CaseBuilder, Contestant, leaf
from kernels.launch import (
    check_same_device,
    check_shape,
    compute_dtype,
    first_derivative_only,
    no_autocast,
    resolve_backend,
)
from kernels.matmul import goes_to_onednn, matmul

# Rows that an expert's matmul is padded to a multiple of, where that pays.
PADDED_ROWS = 32


class Span(NamedTuple):
    """Rows `first` to `end` of one expert; rows from `end` to `stop` are padding."""

    expert: int
    first: int
    end: int
    stop: int


class RowLayout(NamedTuple):
    """Where the rows of a plan lie in the buffers of a matmul.

    spans: of every expert that has rows, in their order. num_rows: of a buffer. position: (R,)
    buffer row of each row, or None where both are the same; unused rows have none.
    """

    spans: list[Span]
    num_rows: int
    position: Tensor | None


def row_quantum(num_rows: int, num_experts: int, x: Tensor) -> int:
    """The number of rows of an expert's matmul, of which x is a factor, is padded to a multiple of
    this.

    On a CPU, oneDNN compiles each new shape of a matmul at its first use, which takes two to five
    times as long as the matmul; and experts have another number of rows at every step. Padded, the
    shapes repeat and the compiled ones are found again. Few rows have few shapes as they are.
    """
    narrow = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
    many = num_rows >= PADDED_ROWS * num_experts
    return PADDED_ROWS if many and (narrow or goes_to_onednn(x)) else 1


def layout_rows(expert_offsets: Tensor, num_rows: int, x: Tensor) -> RowLayout:
    """Lay out `num_rows` rows for matmuls of x so that each expert begins at a multiple of
    `row_quantum`."""
    offsets = expert_offsets.tolist()
    quantum = row_quantum(num_rows, len(offsets) - 1, x)
    spans, start = [], 0
    for e, (first, end) in enumerate(itertools.pairwise(offsets)):
        if end > first:
            stop = start + -(-(end - first) // quantum) * quantum
            spans.append(Span(e, start, start + end - first, stop))
            start = stop
    if quantum == 1 or not spans:
        return RowLayout(spans, num_rows, None)
    shifts = torch.tensor([span.first - offsets[span.expert] for span in spans], dtype=torch.long)
    sizes = torch.tensor([span.end - span.first for span in spans], dtype=torch.long)
    position = torch.arange(offsets[-1]) + shifts.repeat_interleave(sizes)
    return RowLayout(spans, start, position.to(expert_offsets.device))


def place_rows(rows: Tensor, layout: RowLayout) -> Tensor:
    """Move rows (R, ...) to their positions in a buffer; padding is zero."""
    if layout.position is None:
        return rows
    placed = rows.new_zeros(layout.num_rows, *rows.shape[1:])
    return placed.index_copy_(0, layout.position, rows[: layout.position.numel()])


def take_rows(placed: Tensor, layout: RowLayout, num_rows: int) -> Tensor:
    """The reverse of `place_rows`: (num_rows, ...), unused rows zero."""
    used = rows_in_use(layout)
    if layout.position is None:
        placed[used:] = 0
        return placed
    rows = placed.new_empty(num_rows, *placed.shape[1:])
    torch.index_select(placed, 0, layout.position, out=rows[:used])
    rows[used:] = 0
    return rows


def rows_in_use(layout: RowLayout) -> int:
    """Number of rows that belong to an expert."""
    return sum(span.end - span.first for span in layout.spans)


def zero_idle_experts(layout: RowLayout, *buffers: Tensor) -> None:
    """Zero the slices of each (E, ...) buffer whose expert has no rows.

    The busy ones are written whole; filling all of a large stack first costs a quarter of a layer.
    """
    busy = {span.expert for span in layout.spans}
    for buffer in buffers:
        for e in range(buffer.shape[0]):
            if e not in busy:
                buffer[e] = 0


class _GroupedMatmul(torch.autograd.Function):
    # `weight[e]` under autograd would make a zero tensor of the whole stack for each expert in the
    # backward pass (5 times the time at 64 experts); a Function writes each slice once.
    @staticmethod
    def forward(ctx, rows, weight, expert_offsets, dtype):
        rows_dtype, rows = rows.dtype, rows.to(dtype)
        layout = layout_rows(expert_offsets, rows.shape[0], rows)
        x, w = place_rows(rows, layout), weight.to(dtype)
        out = x.new_empty(x.shape[0], weight.shape[1])
        for e, first, _, stop in layout.spans:
            matmul(x[first:stop], w[e].T, out=out[first:stop])
        ctx.save_for_backward(x, w)
        ctx.layout, ctx.num_rows, ctx.dtypes = layout, rows.shape[0], (rows_dtype, weight.dtype)
        return take_rows(out, layout, rows.shape[0])

    @staticmethod
    @first_derivative_only
    def backward(ctx, grad_out):
        x, w = ctx.saved_tensors
        rows_dtype, weight_dtype = ctx.dtypes
        grad_out = place_rows(grad_out.contiguous(), ctx.layout)
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_rows = torch.empty_like(x)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(w, dtype=weight_dtype)
            zero_idle_experts(ctx.layout, grad_weight)
        for e, first, _, stop in ctx.layout.spans:
            g = grad_out[first:stop]
            if grad_rows is not None:
                matmul(g, w[e], out=grad_rows[first:stop])
            if grad_weight is not None:
                matmul(g.T, x[first:stop], out=grad_weight[e])
        if grad_rows is not None:
            grad_rows = take_rows(grad_rows, ctx.layout, ctx.num_rows).to(rows_dtype)
        return grad_rows, grad_weight, None, None


def grouped_matmul(
    rows: Tensor, weight: Tensor, expert_offsets: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Multiply each expert's rows with its own matrix.

    Args:
        rows: (R, D_in), sorted by expert.
        weight: (E, D_out, D_in), each matrix laid out as in `nn.Linear`.
        expert_offsets: (E+1,) int64, first row of each expert; `expert_offsets[E]` <= R.
        backend: `auto`, `triton` or `torch`.
    Returns:
        (R, D_out) in the dtype of the matmul (autocast's, else that of `rows`).
    Raises:
        ValueError: if the shapes do not fit.
    """
    check_shape("grouped_matmul", "weight", weight, (None, None, None))
    check_shape("grouped_matmul", "rows", rows, (None, weight.shape[2]))
    check_shape("grouped_matmul", "expert_offsets", expert_offsets, (weight.shape[0] + 1,))
    check_same_device("grouped_matmul", rows=rows, weight=weight, expert_offsets=expert_offsets)
    dtype = compute_dtype(rows)
    if resolve_backend("grouped_matmul", backend, rows, has_triton=True) == "triton":
        from kernels.grouped_matmul_triton import grouped_matmul_op

        cast = None if weight.dtype == dtype else weight.detach().to(dtype).contiguous()
        rows, weight = rows.to(dtype).contiguous(), weight.contiguous()
        return grouped_matmul_op(rows, weight, cast, expert_offsets.contiguous())
    with no_autocast(rows):
        return _GroupedMatmul.apply(rows, weight, expert_offsets, dtype)


def benchmark_cases(dtype: torch.dtype, device: str) -> list[CaseBuilder]:
    """Forward and backward against `F.grouped_mm`."""
    shapes = ((4096, 256, 512, 8), (32768, 512, 512, 64), (65536, 2048, 768, 128))
    return [
        CaseBuilder(name, functools.partial(_benchmark_case, name, shape, dtype, device))
        for name, shape in (("R{} D{} N{} E{}".format(*shape), shape) for shape in shapes)
    ]


def _benchmark_case(
    name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> Case:
    num_rows, d_in, d_out, num_experts = shape
    torch.manual_seed(0)
    x = leaf(num_rows, d_in, dtype=dtype, device=device)
    weight = leaf(num_experts, d_out, d_in, std=d_in**-0.5, dtype=dtype, device=device)
    expert = torch.randint(0, num_experts, (num_rows,), device=device)
    ends = torch.bincount(expert, minlength=num_experts).cumsum(0)
    offsets = torch.nn.functional.pad(ends, (1, 0))

    def library(x: Tensor, weight: Tensor) -> Tensor:
        matrices = weight.transpose(1, 2)
        return torch.nn.functional.grouped_mm(x, matrices, offs=ends.to(torch.int32))

    def loop(rows: Tensor, matrices: Tensor) -> Tensor:
        sizes = ends.diff(prepend=ends.new_zeros(1)).tolist()
        pairs = zip(rows.split(sizes), matrices.unbind(0), strict=True)
        return torch.cat([part @ matrix.T for part, matrix in pairs])

    return Case(
        name=name,
        ours=lambda x, weight, backend: grouped_matmul(x, weight, offsets, backend=backend),
        leaves=(x, weight),
        reference=loop,
        rivals={
            "F.grouped_mm": Contestant(library, (x, weight)),
            "loop of matmuls": Contestant(loop, (x, weight)),
        },
        grad=torch.randn(num_rows, d_out, device=device).to(dtype),
        tokens=num_rows,
        flops=2 * num_rows * d_in * d_out,
    )
