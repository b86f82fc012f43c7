"""One matmul per expert over contiguous rows.

    out[r] = weight[e] @ rows[r],   expert_offsets[e] <= r < expert_offsets[e + 1]

Rows behind the last offset are unused: never read, and 0 in the output.
"""

import itertools

import torch
from torch import Tensor

from kernels.bench import Case, leaf
from kernels.launch import check_shape, compute_dtype, no_autocast, resolve_backend


def segments(expert_offsets: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, end row) of every expert that has rows."""
    spans = enumerate(itertools.pairwise(expert_offsets.tolist()))
    return [(e, first, end) for e, (first, end) in spans if end > first]


def rows_in_use(spans: list[tuple[int, int, int]]) -> int:
    """Number of rows that belong to an expert."""
    return spans[-1][2] if spans else 0


def zero_unused_rows(spans: list[tuple[int, int, int]], *buffers: Tensor) -> None:
    """Zero the rows of each (R, ...) buffer that belong to no expert."""
    for buffer in buffers:
        buffer[rows_in_use(spans) :] = 0


def zero_idle_experts(spans: list[tuple[int, int, int]], *buffers: Tensor) -> None:
    """Zero the slices of each (E, ...) buffer whose expert has no rows.

    The busy ones are written whole; filling all of a large stack first costs a quarter of a layer.
    """
    busy = {e for e, _, _ in spans}
    for buffer in buffers:
        for e in range(buffer.shape[0]):
            if e not in busy:
                buffer[e] = 0


class _GroupedMatmul(torch.autograd.Function):
    # `weight[e]` under autograd would make a zero tensor of the whole stack for each expert in the
    # backward pass (5 times the time at 64 experts); a Function writes each slice once.
    @staticmethod
    def forward(ctx, rows, weight, expert_offsets, dtype):
        spans = segments(expert_offsets)
        x, w = rows.to(dtype), weight.to(dtype)
        out = x.new_empty(rows.shape[0], weight.shape[1])
        zero_unused_rows(spans, out)
        for e, first, end in spans:
            torch.mm(x[first:end], w[e].T, out=out[first:end])
        ctx.save_for_backward(x, w)
        ctx.spans, ctx.dtypes = spans, (rows.dtype, weight.dtype)
        return out

    @staticmethod
    def backward(ctx, grad_out):
        x, w = ctx.saved_tensors
        rows_dtype, weight_dtype = ctx.dtypes
        grad_out = grad_out.contiguous()
        grad_rows = torch.empty_like(x)
        zero_unused_rows(ctx.spans, grad_rows)
        grad_weight = torch.empty_like(w, dtype=weight_dtype)
        zero_idle_experts(ctx.spans, grad_weight)
        for e, first, end in ctx.spans:
            g = grad_out[first:end]
            torch.mm(g, w[e], out=grad_rows[first:end])
            grad_weight[e] = g.T @ x[first:end]
        return grad_rows.to(rows_dtype), grad_weight, None, None


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
    resolve_backend("grouped_matmul", backend, rows)
    dtype = compute_dtype(rows)
    with no_autocast(rows):
        return _GroupedMatmul.apply(rows, weight, expert_offsets, dtype)


def benchmark_cases(dtype: torch.dtype, device: str) -> list[Case]:
    """Forward and backward against `F.grouped_mm`."""
    shapes = ((4096, 256, 512, 8), (32768, 512, 512, 64))
    return [_benchmark_case(shape, dtype, device) for shape in shapes]


def _benchmark_case(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> Case:
    num_rows, d_in, d_out, num_experts = shape
    torch.manual_seed(0)
    x = leaf(num_rows, d_in, dtype=dtype, device=device)
    weight = leaf(num_experts, d_out, d_in, std=d_in**-0.5, dtype=dtype, device=device)
    grad = leaf(num_rows, d_out, dtype=dtype, device=device)
    expert = torch.randint(0, num_experts, (num_rows,), device=device)
    ends = torch.bincount(expert, minlength=num_experts).cumsum(0)
    offsets = torch.nn.functional.pad(ends, (1, 0))

    def ours():
        out = grouped_matmul(x, weight, offsets)
        return out, *torch.autograd.grad(out, (x, weight), grad)

    def library():
        matrices = weight.transpose(1, 2)
        out = torch.nn.functional.grouped_mm(x, matrices, offs=ends.to(torch.int32))
        return out, *torch.autograd.grad(out, (x, weight), grad)

    def reference():
        rows, matrices = (t.detach().double().requires_grad_() for t in (x, weight))
        parts = [rows[first:end] @ matrices[e].T for e, first, end in segments(offsets)]
        out = torch.cat(parts)
        return out, *torch.autograd.grad(out, (rows, matrices), grad.double())

    return Case(
        name=f"R{num_rows} D_in {d_in} D_out {d_out} E{num_experts}",
        ours=ours,
        reference=reference,
        rivals={"F.grouped_mm": library},
        flops=6 * num_rows * d_in * d_out,
    )
