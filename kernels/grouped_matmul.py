"""One matmul per expert over contiguous rows.

    out[r] = weight[e] @ rows[r],   expert_offsets[e] <= r < expert_offsets[e + 1]

Rows behind the last offset are unused: never read, and 0 in the output.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.bench import Case, CaseBuilder, Contestant, leaf
from kernels.launch import (
    check_floating,
    check_integers,
    check_offsets,
    check_same_device,
    check_shape,
    compute_dtype,
    first_derivative_only,
    no_autocast,
    resolve_backend,
)
from kernels.matmul import add_matmul, goes_to_onednn, matmul

# Rows that an expert's matmul is padded to a multiple of, where that pays.
PADDED_ROWS = 32
# A batched matmul has at most so many rows: from there on that of one expert keeps the cores busy.
# Sharing one adds at most this share to the rows that its experts would have apart.
MAX_BATCH_ROWS = 1 << 15
MAX_PADDING = 1 / 8


class Batch(NamedTuple):
    """Neighbouring experts that share a batched matmul; one alone, a plain one.

    expert: the first of them. first: its first row. size: rows of each, padding included. used:
    those of each that are no padding.
    """

    expert: int
    first: int
    size: int
    used: list[int]

    @property
    def stop(self) -> int:
        return self.first + self.size * len(self.used)


class RowLayout(NamedTuple):
    """Where the rows of a plan lie in the buffers of a matmul.

    batches: of every expert that has rows, in their order. num_rows: of a buffer. position: (R,)
    buffer row of each row, or None where both are the same; unused rows have none.
    """

    batches: list[Batch]
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


def shares_batches(num_rows: int, num_experts: int, x: Tensor) -> bool:
    """Whether experts with about as many rows share a matmul: where rows are padded anyway, and
    PyTorch has a batched product by the same library (of float32 by oneDNN it has none)."""
    padded = row_quantum(num_rows, num_experts, x) > 1
    return num_experts > 1 and padded and not goes_to_onednn(x)


def expected_padding(num_rows: int, num_experts: int, x: Tensor) -> int:
    """Rows of padding that `layout_rows` adds about where routing is even; else it adds fewer.

    Half of `row_quantum` an expert, and half of what sharing batches may add.
    """
    quantum = row_quantum(num_rows, num_experts, x)
    apart = num_experts * quantum // 2 if quantum > 1 else 0
    shared = num_rows * MAX_PADDING / 2 if shares_batches(num_rows, num_experts, x) else 0
    return apart + int(shared)


def layout_rows(expert_offsets: Tensor, num_rows: int, x: Tensor) -> RowLayout:
    """Lay out `num_rows` rows for matmuls of x so that each expert begins at a multiple of
    `row_quantum`."""
    offsets = expert_offsets.tolist()
    used = [end - first for first, end in itertools.pairwise(offsets)]
    quantum = row_quantum(num_rows, len(used), x)
    max_rows = MAX_BATCH_ROWS if shares_batches(num_rows, len(used), x) else 0
    batches, start = [], 0
    for expert, members in _batches(used, 0, quantum, max_rows):
        batches.append(Batch(expert, start, _round_up(max(members), quantum), members))
        start = batches[-1].stop
    if quantum == 1 or not batches:
        return RowLayout(batches, num_rows, None)
    shifts = [
        batch.first + i * batch.size - offsets[batch.expert + i]
        for batch in batches
        for i in range(len(batch.used))
    ]
    sizes = [n for batch in batches for n in batch.used]
    position = torch.arange(offsets[-1])
    position += torch.tensor(shifts).repeat_interleave(torch.tensor(sizes))
    return RowLayout(batches, start, position.to(expert_offsets.device))


def _round_up(rows: int, quantum: int) -> int:
    return -(-rows // quantum) * quantum


def _batches(
    used: list[int], expert: int, quantum: int, max_rows: int
) -> Iterator[tuple[int, list[int]]]:
    """Halve the experts until each part is worth one batched matmul: (first expert, rows of each).

    Halves, and not the longest runs that fit, so that the numbers of experts repeat.
    """
    if len(used) <= 1:
        if any(used):
            yield expert, used
        return
    rows = _round_up(max(used), quantum) * len(used)
    apart = sum(_round_up(n, quantum) for n in used)
    if min(used) > 0 and rows <= min(max_rows, apart * (1 + MAX_PADDING)):
        yield expert, used
    else:
        half = len(used) // 2
        yield from _batches(used[:half], expert, quantum, max_rows)
        yield from _batches(used[half:], expert + half, quantum, max_rows)


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
    return sum(sum(batch.used) for batch in layout.batches)


def zero_idle_experts(layout: RowLayout, *buffers: Tensor) -> None:
    """Zero the slices of each (E, ...) buffer whose expert has no rows.

    The busy ones are written whole; filling all of a large stack first costs a quarter of a layer.
    """
    busy = {batch.expert + i for batch in layout.batches for i in range(len(batch.used))}
    for buffer in buffers:
        for e in range(buffer.shape[0]):
            if e not in busy:
                buffer[e] = 0


def _row_views(buffer: Tensor, batches: list[Batch]) -> list[Tensor]:
    """Views of a buffer (R, D) that begins with the first batch's first row: (B, size, D) of a
    batch, (size, D) of an expert alone."""
    sizes = [batch.stop - batch.first for batch in batches]
    parts = buffer[: sum(sizes)].split(sizes)
    return [
        part if len(batch.used) == 1 else part.view(len(batch.used), batch.size, -1)
        for part, batch in zip(parts, batches, strict=True)
    ]


def _matrix_views(stack: Tensor, batches: list[Batch]) -> list[Tensor]:
    """Views of a stack (E, N, K): (B, N, K) of a batch, (N, K) of an expert alone."""
    return [
        stack[batch.expert]
        if len(batch.used) == 1
        else stack[batch.expert : batch.expert + len(batch.used)]
        for batch in batches
    ]


def multiply_rows(
    rows: Tensor, stack: Tensor, out: Tensor, batches: list[Batch], *, add: bool = False
) -> None:
    """out[r] = rows[r] @ stack[e of r], or out[r] += that, for the rows of the batches.

    rows: (R, D_in), out: (R, D_out), which both begin with the first batch. stack: (E, D_in,
    D_out).
    """
    # All views before the products: made between them they delay each, and layers of 64 small
    # experts take 2 to 4 % longer.
    views = _row_views(rows, batches), _matrix_views(stack, batches), _row_views(out, batches)
    for x, matrix, y in zip(*views, strict=True):
        if add:
            add_matmul(y, x, matrix)
        else:
            matmul(x, matrix, out=y)


def weight_gradients(
    grad: Tensor, rows: Tensor, stacks: tuple[Tensor, ...], batches: list[Batch]
) -> None:
    """Write grad^T @ rows of each expert of the batches to its slices of the stacks.

    grad: (R, D_out), rows: (R, D_in), which both begin with the first batch. stacks: each (E, M,
    D_in) of any dtype, which share the D_out columns of grad.
    """
    matrices = zip(*(_matrix_views(stack, batches) for stack in stacks), strict=True)
    views = _row_views(grad, batches), _row_views(rows, batches), matrices
    for g, x, grad_w in zip(*views, strict=True):
        if len(grad_w) == 1:
            matmul(g.mT, x, out=grad_w[0])
        else:
            for matrix, part in zip(grad_w, matmul(g.mT, x).chunk(len(grad_w), -2), strict=True):
                matrix.copy_(part)


class _GroupedMatmul(torch.autograd.Function):
    # `weight[e]` under autograd would make a zero tensor of the whole stack for each expert in the
    # backward pass (5 times the time at 64 experts); a Function writes each slice once.
    @staticmethod
    def forward(ctx, rows, weight, expert_offsets, dtype):
        rows_dtype, rows = rows.dtype, rows.to(dtype)
        layout = layout_rows(expert_offsets, rows.shape[0], rows)
        x, w = place_rows(rows, layout), weight.to(dtype)
        out = x.new_empty(x.shape[0], weight.shape[1])
        multiply_rows(x, w.mT, out, layout.batches)
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
            multiply_rows(grad_out, w, grad_rows, ctx.layout.batches)
            grad_rows = take_rows(grad_rows, ctx.layout, ctx.num_rows).to(rows_dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(w, dtype=weight_dtype)
            zero_idle_experts(ctx.layout, grad_weight)
            weight_gradients(grad_out, x, (grad_weight,), ctx.layout.batches)
        return grad_rows, grad_weight, None, None


def grouped_matmul(
    rows: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    *,
    backend: str = "auto",
    debug: bool = False,
) -> Tensor:
    """Multiply each expert's rows with its own matrix.

    Args:
        rows: (R, D_in), sorted by expert.
        weight: (E, D_out, D_in), each matrix laid out as in `nn.Linear`.
        expert_offsets: (E+1,) int64, first row of each expert; `expert_offsets[E]` <= R.
        backend: see `kernels.launch`.
        debug: look at the offsets first, which waits for a GPU. PyTorch's body always does; what
            the Triton kernels do with wrong ones is undefined.
    Returns:
        (R, D_out) in the dtype of the matmul (autocast's, else that of `rows`).
    Raises:
        ValueError: if shapes, dtypes or devices do not fit, or offsets that are looked at do not
            ascend from 0 to at most R.
    """
    check_shape("grouped_matmul", "weight", weight, (None, None, None))
    check_shape("grouped_matmul", "rows", rows, (None, weight.shape[2]))
    check_shape("grouped_matmul", "expert_offsets", expert_offsets, (weight.shape[0] + 1,))
    check_floating("grouped_matmul", rows=rows, weight=weight)
    check_integers("grouped_matmul", expert_offsets=expert_offsets)
    check_same_device("grouped_matmul", rows=rows, weight=weight, expert_offsets=expert_offsets)
    dtype = compute_dtype(rows)
    chosen = resolve_backend("grouped_matmul", backend, rows, has_triton=True)
    if debug or chosen != "triton":
        check_offsets("grouped_matmul", expert_offsets, rows.shape[0])
    if chosen == "triton":
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
