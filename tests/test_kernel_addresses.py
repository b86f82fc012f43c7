"""Do the kernels reach what lies behind 2**31 elements?

In the interpreter the far tensors are address space alone, of which a few pages are touched, and of
a grid over all rows only the last programs run. The same numbers near the start of small tensors
must give the same bits.
"""

import os
from typing import Any

import pytest
import torch
from conftest import randn

triton = pytest.importorskip("triton")

from kernels.attention_triton import (  # noqa: E402
    MAX_ROW_STRIDE,
    _delta,
    _grad_keys,
    attention_backward_op,
    attention_op,
)
from kernels.cross_entropy_triton import _launch_softmax  # noqa: E402
from kernels.dispatch_triton import gather_sum, permute_op, unpermute_backward_op  # noqa: E402
from kernels.grouped_matmul_triton import grouped_linear, transposed, weight_grads  # noqa: E402
from kernels.grouped_tiles import Groups  # noqa: E402
from kernels.rms_norm_triton import rms_norm_backward_op, rms_norm_op  # noqa: E402
from kernels.rope_triton import rope_op  # noqa: E402
from kernels.routing_triton import topk_backward_op, topk_op  # noqa: E402
from kernels.swiglu_experts_triton import _down_backward, _sum_partials, _up  # noqa: E402

BFLOAT16 = torch.bfloat16
SIZE = 512
# Rows of SIZE, of which the last lie behind 2**31 elements; a multiple of every block of rows.
FAR_ROWS = 2**31 // SIZE + 2**13
# Matrices of SIZE x SIZE.
FAR_EXPERTS = 2**31 // SIZE**2 + 1


@pytest.fixture(autouse=True)
def room(device):
    """Far tensors are of up to 8.6 GB, which some systems refuse to map; on a GPU all are real."""
    if device.type == "cuda":
        free, needed = torch.cuda.mem_get_info()[0], 64e9
    else:
        free, needed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), 9e9
    if free < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of memory")


@pytest.fixture
def last_programs(monkeypatch):
    """Of each grid the last programs alone run: `last_programs(how_many)`. All of them on a GPU."""
    if torch.cuda.is_available():
        return lambda count: None
    from triton.runtime import interpreter

    builder, kernels = interpreter.interpreter_builder, interpreter.InterpretedFunction
    run, set_dim, set_index = kernels.run, builder.set_grid_dim, builder.set_grid_idx

    def choose(count: int) -> None:
        def run_last(kernel: Any, *args: Any, grid: tuple[int, ...], **kwargs: Any) -> Any:
            skipped = max(0, grid[0] - count)
            monkeypatch.setattr(
                builder, "set_grid_dim", lambda *_: set_dim(*grid, *[1] * (3 - len(grid)))
            )
            monkeypatch.setattr(
                builder, "set_grid_idx", lambda x, y, z: set_index(x + skipped, y, z)
            )
            return run(kernel, *args, grid=(grid[0] - skipped, *grid[1:]), **kwargs)

        monkeypatch.setattr(kernels, "run", run_last)

    return choose


def far(near: torch.Tensor, count: int = FAR_ROWS) -> torch.Tensor:
    """(count, ...) with `near` at the end, behind memory as it comes; of indices, behind zeros."""
    shape = count, *near.shape[1:]
    room = near.new_empty(shape) if near.is_floating_point() else near.new_zeros(shape)
    room[-len(near) :] = near
    return room


def assert_same_end(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for far_one, near_one in zip(actual, expected, strict=True):
        assert torch.equal(far_one[-len(near_one) :], near_one)
        assert near_one.count_nonzero()


class OneTile(Groups):
    """The last rows, of the last expert, as the only tile."""

    def __init__(self, num_experts: int, num_rows: int, used: int, device: torch.device):
        super().__init__(torch.zeros(num_experts + 1, dtype=torch.int64, device=device), num_rows)
        self.last = [[num_experts - 1], [num_rows - used], [num_rows]]

    def num_tiles(self, block_m):
        return 1

    def tile_map(self, block_m):
        return self.offsets.new_tensor(self.last, dtype=torch.int32)


def expert_layer(groups: Groups, matrices, x, grad, scale, token):
    """What the kernels of the layer make of its rows."""
    w1, w2, w3 = matrices
    h, a = _up(x, w1, w3, token, groups, None, keep_h=True, make_a=True)
    y = grouped_linear(a, w2, groups, scale)
    scaled_a, grad_h, partial = _down_backward(grad, w2, h, a, scale, token, groups, None)
    return h, a, y, scaled_a, grad_h, partial.T, transposed(grad_h, (w1, w3), groups)


def test_expert_layers_reach_far_rows_and_matrices(device):
    matrices = [randn(1, SIZE, SIZE, seed=s, device=device).to(BFLOAT16) / 16 for s in range(3)]
    x, grad = (randn(2, SIZE, seed=s, device=device).to(BFLOAT16) for s in (3, 4))
    scale, token = randn(2, seed=5, device=device), torch.tensor([1, 0], device=device)
    near = expert_layer(OneTile(1, 2, 2, device), matrices, x, grad, scale, token)
    groups = OneTile(FAR_EXPERTS, FAR_ROWS, 2, device)
    far_matrices = [far(w, FAR_EXPERTS) for w in matrices]
    far_token = far(FAR_ROWS - 2 + token)
    rows = far(x), far(grad), far(scale), far_token
    actual = expert_layer(groups, far_matrices, *rows)
    assert_same_end(actual, near)
    # Their gradients, of rows that lie behind each other and of those that are gathered.
    groups = Groups(torch.tensor([FAR_ROWS - 2, FAR_ROWS], device=device), FAR_ROWS)
    grad_h = near[4]
    expected = weight_grads(
        grad_h, x[token], Groups(torch.tensor([0, 2], device=device), 2), BFLOAT16, halves=2
    )
    gathered = weight_grads(actual[4], rows[0], groups, BFLOAT16, halves=2, right_token=far_token)
    assert_same_end(gathered, expected)


def test_weight_gradients_reach_far_experts(device, last_programs):
    left, right = (randn(2, SIZE, seed=s, device=device).to(BFLOAT16) for s in (1, 2))
    left = torch.cat([left, right], 1)
    offsets = torch.tensor([0, 2], device=device)
    expected = weight_grads(left, right, Groups(offsets, 2), BFLOAT16, halves=2)
    last_programs(256)
    offsets = torch.cat([offsets.new_zeros(FAR_EXPERTS - 1), offsets])
    assert_same_end(weight_grads(left, right, Groups(offsets, 2), BFLOAT16, halves=2), expected)


def test_gradients_of_combine_weights_reach_far_parts(device):
    num_parts, num_rows = 2**9 + 1, 2**22
    parts = randn(num_parts, 2, seed=1, device=device)
    far_parts = torch.empty(num_parts, num_rows, device=device)
    far_parts[:, -2:] = parts
    row_of = torch.tensor([[1], [0]], device=device)
    near_groups, groups = (OneTile(1, rows, 2, device) for rows in (2, num_rows))
    expected = _sum_partials(parts, torch.empty(2, 1, device=device), row_of, near_groups)
    actual = _sum_partials(
        far_parts, torch.empty(2, 1, device=device), num_rows - 2 + row_of, groups
    )
    assert torch.equal(actual, expected)


def test_dispatch_reaches_far_rows_and_tokens(device, last_programs):
    x, grad = (randn(4, SIZE, seed=s, device=device).to(BFLOAT16) for s in (1, 2))
    weights, order = randn(4, 1, seed=3, device=device), torch.tensor([2, 0, 3, 1], device=device)
    row_of, offsets = order.argsort().unsqueeze(1), torch.tensor([0, 4], device=device)
    far_x, far_weights = far(x), far(weights)
    far_order, far_row_of = far(FAR_ROWS - 4 + order), far(FAR_ROWS - 4 + row_of)
    far_offsets = torch.tensor([0, FAR_ROWS], device=device)
    plan, far_plan = (offsets, order, row_of), (far_offsets, far_order, far_row_of)
    expected = (
        permute_op(x, order, row_of),
        gather_sum(x, row_of, weights),
        *unpermute_backward_op(grad, x, weights, *plan),
    )
    last_programs(1)
    actual = (
        permute_op(far_x, far_order, far_row_of),
        gather_sum(far_x, far_row_of, far_weights),
        *unpermute_backward_op(far(grad), far_x, far_weights, *far_plan),
    )
    assert_same_end(actual, expected)


def test_routing_reaches_far_tokens(device, last_programs):
    logits, grad = (randn(128, SIZE, seed=s, device=device) for s in (1, 2))
    grad_weights, options = randn(128, 3, seed=3, device=device), (1, True)

    def forward_and_backward(logits, grad):
        weights, indices, probs, finite = topk_op(logits, None, 3, *options, 0, 0)
        grads = far(grad_weights, len(logits)), grad
        back = topk_backward_op(*grads, probs, indices, torch.float32, *options)
        return weights, indices, probs, finite, back

    expected = forward_and_backward(logits, grad)
    last_programs(1)
    assert_same_end(forward_and_backward(far(logits), far(grad)), expected)


def test_attention_reaches_far_sequences(device, last_programs):
    q, k, v, grad = (
        randn(1, 2, 1, SIZE // 2, seed=s, device=device).to(BFLOAT16) for s in range(4)
    )
    documents, options = (None, None, None), (2, 0.1)

    def forward_and_backward(q, k, v, grad, grad_q):
        out, lse = attention_op(q, k, v, *documents, *options, True)
        grads = attention_backward_op(grad, q, k, v, out, lse, *documents, *options, True)
        # By atomics, into a gradient that is there already.
        statistics = lse, _delta(grad, out)
        added = _grad_keys((q, k, v, grad), statistics, documents[:2], *options, grad_q)
        return out, lse, *grads, grad_q, *added

    zeros = torch.zeros_like(q, dtype=torch.float32)
    far_zeros = far(zeros)
    expected = forward_and_backward(q, k, v, grad, zeros)
    last_programs(1)
    assert_same_end(forward_and_backward(far(q), far(k), far(v), far(grad), far_zeros), expected)


def spread(near: torch.Tensor, stride: int) -> torch.Tensor:
    """The same (B, S, H, P), each position that many elements behind the one before it."""
    num_positions, size = near.shape[1], near[0, 0].numel()
    room = near.new_empty(num_positions * stride + size)
    strides = num_positions * stride, stride, near.shape[3], 1
    return room.as_strided(near.shape, strides).copy_(near)


def test_attention_reaches_far_positions(device):
    # The last block begins behind 2**31 elements.
    tensors = [randn(1, 450, 1, 16, seed=s, device=device).to(BFLOAT16) for s in range(4)]
    far_tensors = [spread(x, MAX_ROW_STRIDE - 16) for x in tensors]
    documents, options = (None, None, None), (450, 0.3)
    results = []
    for q, k, v, grad in (tensors, far_tensors):
        out, lse = attention_op(q, k, v, *documents, *options, True)
        # By atomics the bits vary on a GPU.
        for deterministic in (True,) if device.type == "cuda" else (True, False):
            saved = grad, q, k, v, out, lse, *documents
            results.append((out, *attention_backward_op(*saved, *options, deterministic)))
    half = len(results) // 2
    for near, actual in zip(results[:half], results[half:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(near, actual, strict=True))


def test_rope_reaches_far_positions(device):
    q, k = (randn(1, 450, 1, 16, seed=s, device=device).to(BFLOAT16) for s in (1, 2))
    angles = randn(450, 8, seed=3, device=device)
    cos, sin = angles.cos(), angles.sin()
    far_in = (spread(x, MAX_ROW_STRIDE - 16) for x in (q, k))
    actual, expected = rope_op(*far_in, cos, sin, False), rope_op(q, k, cos, sin, False)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_rms_norm_reaches_far_rows(device, last_programs):
    x, grad = (randn(4, SIZE, seed=s, device=device).to(BFLOAT16) for s in (1, 2))
    weight = randn(SIZE, seed=3, device=device).to(BFLOAT16)

    def forward_and_backward(x, grad):
        y, inverse = rms_norm_op(x, weight, 1e-6, BFLOAT16)
        return y, inverse, rms_norm_backward_op(grad, x, weight, inverse)[0]

    expected = forward_and_backward(x, grad)
    last_programs(1)
    assert_same_end(forward_and_backward(far(x), far(grad)), expected)


def test_rope_reaches_far_sequences(device, last_programs):
    q, k = (randn(1, 1, 1, SIZE, seed=s, device=device).to(BFLOAT16) for s in (1, 2))
    angles = randn(1, SIZE // 2, seed=3, device=device)
    cos, sin = angles.cos(), angles.sin()
    expected = rope_op(q, k, cos, sin, False)
    # The programs of q come first: those of k alone run here, which are the same.
    last_programs(1)
    assert_same_end(rope_op(far(q), far(k), cos, sin, False)[1:], expected[1:])


def test_cross_entropy_reaches_far_logits(device, last_programs):
    logits, labels = randn(64, SIZE, seed=1, device=device), torch.arange(64, device=device)

    def losses_and_gradient(logits, labels):
        losses = logits.new_empty(2, len(logits))
        _launch_softmax(logits, labels, losses, 0, -100, 1e-3, True)
        return *losses, logits

    far_logits = far(logits)
    expected = losses_and_gradient(logits, labels)
    last_programs(1)
    assert_same_end(losses_and_gradient(far_logits, far(labels)), expected)
