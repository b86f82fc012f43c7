"""Does each row meet its own expert's matrix, and no other?"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    NUM_TOKENS,
    ROUTINGS,
    assert_bfloat16,
    assert_equals,
    assignments,
    gradients,
    leaves,
    randn,
    random_tokens,
    seeds,
)

from kernels.dispatch import plan_dispatch
from kernels.grouped_matmul import (
    MAX_BATCH_ROWS,
    PADDED_ROWS,
    Batch,
    expected_padding,
    grouped_matmul,
    layout_rows,
    place_rows,
    rows_in_use,
    shares_batches,
    take_rows,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
D_IN, D_OUT = 17, 11

# In the interpreter many tokens take long.
BODIES = [("torch", n) for n in NUM_TOKENS]
BODIES += [("triton", n) for n in NUM_TOKENS if n <= 63]
BODIES += [pytest.param("triton", n, marks=pytest.mark.slow) for n in NUM_TOKENS if n > 63]


def expert_of_row(case, num_tokens, device):
    """(expert of each row in use, offsets, rows allocated, E)."""
    indices, _, num_experts = assignments(case, num_tokens, device)
    plan = plan_dispatch(indices, num_experts)
    flat = indices.flatten()
    return flat[flat >= 0].sort().values, plan.expert_offsets, plan.num_rows, num_experts


def oracle(rows, weight, expert):
    """Each row's own copy of its matrix."""
    used = torch.einsum("roi,ri->ro", weight[expert], rows[: len(expert)])
    return torch.cat([used, used.new_zeros(len(rows) - len(expert), weight.shape[1])])


def check(device, backend, case, num_tokens, d_in=D_IN, d_out=D_OUT):
    expert, offsets, num_rows, num_experts = expert_of_row(case, num_tokens, device)
    rows = randn(num_rows, d_in, seed=1, device=device)
    weight = randn(num_experts, d_out, d_in, seed=2, device=device)
    grad = randn(num_rows, d_out, seed=3, device=device)
    exact_in = leaves(rows, weight, dtype=torch.float64)
    exact = oracle(*exact_in, expert)
    expected = gradients(exact, grad, *exact_in)
    # Unused rows may hold anything, on the way back too.
    rows[len(expert) :], grad[len(expert) :] = torch.nan, torch.nan
    ours_in = leaves(rows, weight)
    ours = grouped_matmul(*ours_in, offsets, backend=backend)
    assert_equals(ours, exact, "output")
    grad_rows, grad_weight = gradients(ours, grad, *ours_in)
    assert_equals(grad_rows, expected[0], "rows")
    assert_equals(grad_weight, expected[1], "weight")
    return ours, grad_rows, grad_weight


@pytest.mark.parametrize(("backend", "num_tokens"), BODIES)
@pytest.mark.parametrize("case", ROUTINGS)
def test_output_and_gradients_equal_float64(device, backend, case, num_tokens):
    if backend == "triton":
        pytest.importorskip("triton")
    check(device, backend, case, num_tokens)


def test_more_columns_than_a_block(device, backend):
    check(device, backend, "dropped", 40, 150, 70)


@pytest.mark.parametrize("way", ["always_onednn", "always_batched"])
@pytest.mark.parametrize("case", ["random", "dropped", "idle experts", "nothing assigned"])
def test_padded_rows_by_each_library_equal_float64(request, device, way, case):
    request.getfixturevalue(way)
    check(device, "torch", case, 63)


def batches(counts, dtype=torch.bfloat16):
    offsets = F.pad(torch.tensor(counts, dtype=torch.long).cumsum(0), (1, 0))
    return layout_rows(offsets, int(offsets[-1]) + 5, torch.zeros(1, dtype=dtype)).batches


def test_halves_of_the_experts_share_a_batch_where_it_pads_little():
    pair, single = Batch(0, 0, 320, [300, 310]), Batch(2, 640, 928, [900])
    assert batches([300, 310, 900, 0]) == [pair, single]
    # 640 rows are 1/9 more than 320 + 256, and 1/4 more than 320 + 192.
    assert [b.used for b in batches([300, 250])] == [[300, 250]]
    assert [b.used for b in batches([300, 190])] == [[300], [190]]
    assert [len(b.used) for b in batches([MAX_BATCH_ROWS // 4] * 8)] == [4, 4]
    assert batches([]) == batches([0, 0]) == []


def test_float32_has_no_batches_and_padding_only_for_onednn(onednn):
    assert batches([300, 310], torch.float64) == [
        Batch(0, 0, 300, [300]),
        Batch(1, 300, 310, [310]),
    ]
    assert batches([300, 310], torch.float32) == [
        Batch(0, 0, 320, [300]),
        Batch(1, 320, 320, [310]),
    ]
    assert shares_batches(600, 2, torch.zeros(1, dtype=torch.bfloat16))
    assert not shares_batches(600, 1, torch.zeros(1, dtype=torch.bfloat16))
    assert not shares_batches(600, 2, torch.zeros(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_experts", "num_rows"), [(1, 1000), (8, 4096), (64, 32768)])
def test_padding_is_about_what_is_expected_of_even_routing(onednn, num_experts, num_rows, dtype):
    x, padding = torch.zeros(1, dtype=dtype), []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        expert = torch.randint(num_experts, (num_rows,), generator=generator)
        offsets = F.pad(torch.bincount(expert, minlength=num_experts).cumsum(0), (1, 0))
        padding.append(layout_rows(offsets, num_rows, x).num_rows - num_rows)
    mean = sum(padding) / len(padding)
    # Without the batches' part a third of it would be expected in bfloat16.
    assert 0.6 * mean < expected_padding(num_rows, num_experts, x) < 2.1 * mean
    assert expected_padding(num_rows, num_experts, x.double()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_experts_give_rows_of_zero(dtype):
    rows, weight = leaves(
        torch.ones(3, 4, dtype=dtype), torch.ones(0, 5, 4, dtype=dtype), dtype=dtype
    )
    out = grouped_matmul(rows, weight, torch.zeros(1, dtype=torch.long))
    assert torch.equal(out, torch.zeros(3, 5, dtype=dtype))
    grads = gradients(out, torch.ones_like(out), rows, weight)
    assert torch.equal(grads[0], torch.zeros(3, 4, dtype=dtype)) and grads[1].shape == (0, 5, 4)


@pytest.mark.parametrize("num_experts", [1, 2, 7, 64])
def test_neighbours_with_about_as_many_rows_share_a_batch(num_experts):
    generator = torch.Generator().manual_seed(num_experts)
    alike = torch.randint(300, 330, (num_experts,), generator=generator)
    uneven = torch.randint(0, 3000, (num_experts,), generator=generator)
    idle = alike * (torch.rand(num_experts, generator=generator) < 0.7)
    for counts in (alike, uneven, idle, torch.zeros_like(alike), alike * 60):
        offsets = F.pad(counts.cumsum(0), (1, 0))
        num_rows = int(offsets[-1]) + 5
        layout = layout_rows(offsets, num_rows, torch.zeros(1, dtype=torch.bfloat16))
        members = [(b.expert + i, n) for b in layout.batches for i, n in enumerate(b.used)]
        assert members == [(e, n) for e, n in enumerate(counts.tolist()) if n]
        assert rows_in_use(layout) == offsets[-1]
        for batch, after in itertools.pairwise(layout.batches):
            assert batch.stop == after.first
        for batch in layout.batches:
            assert batch.size >= max(batch.used) and batch.size % PADDED_ROWS == 0
            if len(batch.used) > 1:
                assert batch.size * len(batch.used) <= MAX_BATCH_ROWS
                assert batch.size * len(batch.used) <= 9 / 8 * sum(n + 31 for n in batch.used)
        if counts is alike:
            assert len(layout.batches) == 1
        if layout.position is not None:
            # Each row once, in order, within its expert's own part.
            assert (layout.position.diff() >= 1).all() and layout.position.max() < layout.num_rows
            rows = torch.arange(num_rows)
            placed = place_rows(rows, layout)
            for batch in layout.batches:
                for i, n in enumerate(batch.used):
                    mine = rows[offsets[batch.expert + i] :][:n]
                    start = batch.first + i * batch.size
                    assert torch.equal(placed[start : start + n], mine)
                    assert (placed[start + n : start + batch.size] == 0).all()
            expected = torch.cat([rows[:-5], torch.zeros(5, dtype=torch.long)])
            assert torch.equal(take_rows(placed, layout, num_rows), expected)


def test_gradcheck():
    _, offsets, num_rows, num_experts = expert_of_row("dropped", 4, "cpu")
    rows, weight = leaves(
        randn(num_rows, 3, seed=1), randn(num_experts, 2, 3, seed=2), dtype=torch.float64
    )
    assert torch.autograd.gradcheck(lambda r, w: grouped_matmul(r, w, offsets), [rows, weight])


def test_bfloat16_by_autocast_is_as_exact_as_eager(device, backend):
    check_bfloat16(device, backend, "idle experts", 128, 64, 48)


def check_bfloat16(device, backend, case, num_tokens, d_in, d_out):
    expert, offsets, num_rows, num_experts = expert_of_row(case, num_tokens, device)
    rows = randn(num_rows, d_in, seed=1, device=device)
    weight = randn(num_experts, d_out, d_in, seed=2, device=device)
    grad = randn(num_rows, d_out, seed=3, device=device)
    ours_in, eager_in = leaves(rows, weight), leaves(rows, weight)
    exact_in = leaves(rows, weight, dtype=torch.float64)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours = grouped_matmul(*ours_in, offsets, backend=backend)
        # Unused rows at the end.
        parts = [eager_in[0][: len(expert)][expert == e] for e in range(num_experts)]
        eager = torch.cat([part @ w.T for part, w in zip(parts, eager_in[1], strict=True)])
        eager = F.pad(eager, (0, 0, 0, num_rows - len(expert)))
    exact = oracle(*exact_in, expert)
    assert ours.dtype == torch.bfloat16
    assert_bfloat16(ours, eager, exact, "output")
    ours_grad = gradients(ours, grad, *ours_in)
    assert [g.dtype for g in ours_grad] == [torch.float32] * 2
    for name, *triple in zip(
        ("rows", "weight"),
        ours_grad,
        gradients(eager, grad, *eager_in),
        gradients(exact, grad, *exact_in),
        strict=True,
    ):
        assert_bfloat16(*triple, name)


def test_noncontiguous_inputs_and_expanded_gradient(device, backend):
    expert, offsets, num_rows, num_experts = expert_of_row("random", 63, device)
    rows = randn(D_IN, num_rows, seed=1, device=device).T
    weight = randn(num_experts, D_IN, D_OUT, seed=2, device=device).transpose(1, 2)
    ours_in = rows.requires_grad_(), weight.requires_grad_()
    exact_in = leaves(rows, weight, dtype=torch.float64)
    total = grouped_matmul(*ours_in, offsets, backend=backend).sum()
    expected = torch.autograd.grad(oracle(*exact_in, expert).sum(), exact_in)
    once = torch.autograd.grad(total, ours_in, retain_graph=True)
    for ours, exact, again in zip(once, expected, torch.autograd.grad(total, ours_in), strict=True):
        assert_equals(ours, exact)
        assert torch.equal(ours, again)


def test_wrong_shapes_are_named():
    rows, weight, offsets = torch.zeros(4, 3), torch.zeros(2, 5, 3), torch.tensor([0, 2, 4])
    cases = [
        ((rows, weight[0], offsets), "weight has shape (5, 3), needs (any, any, any)"),
        ((rows[:, :2], weight, offsets), "rows has shape (4, 2), needs (any, 3)"),
        ((rows, weight, offsets[:2]), "expert_offsets has shape (2,), needs (3)"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError) as caught:
            grouped_matmul(*arguments)
        assert str(caught.value) == f"grouped_matmul: {message}"


def test_second_derivatives_are_refused(device, backend):
    rows, weight, offsets, _ = tensors("random", 9, device)
    ours_in = leaves(rows, weight)
    out = grouped_matmul(*ours_in, offsets, backend=backend)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(out.square().sum(), ours_in, create_graph=True)


@pytest.mark.parametrize("frozen", [0, 1])
def test_no_gradient_is_made_of_what_is_frozen(device, backend, frozen, monkeypatch):
    rows, weight, offsets, grad = tensors("idle experts", 9, device)
    ours_in = leaves(rows, weight)
    whole = gradients(grouped_matmul(*ours_in, offsets, backend=backend), grad, *ours_in)
    ours_in[frozen].requires_grad_(False)
    out = grouped_matmul(*ours_in, offsets, backend=backend)
    unused = {"torch": ["zero_idle_experts", "take_rows"], "triton": ["weight_grads", "transposed"]}
    module = "kernels.grouped_matmul" + ("_triton" if backend == "triton" else "")
    # What would make the frozen one's gradient.
    monkeypatch.setattr(f"{module}.{unused[backend][1 - frozen]}", None)
    assert torch.equal(*gradients(out, grad, ours_in[1 - frozen]), whole[1 - frozen])


def tensors(case, num_tokens, device):
    """(rows, weight, offsets, gradient)."""
    _, offsets, num_rows, num_experts = expert_of_row(case, num_tokens, device)
    rows = randn(num_rows, D_IN, seed=1, device=device)
    weight = randn(num_experts, D_OUT, D_IN, seed=2, device=device)
    return rows, weight, offsets, randn(num_rows, D_OUT, seed=3, device=device)


def test_operators_are_registered_soundly(device):
    triton = pytest.importorskip("kernels.grouped_matmul_triton")
    rows, weight, offsets, grad = tensors("dropped", 9, device)
    ours_in = leaves(rows, weight)
    torch.library.opcheck(triton.grouped_matmul_op, (*ours_in, None, offsets))
    for needs in ([True, True], [False, True], [True, False]):
        backward = grad, rows, weight, offsets, torch.float32, needs
        torch.library.opcheck(triton.grouped_matmul_backward_op, backward)


def test_compiled_graphs_hold_the_kernels_whole(device):
    pytest.importorskip("triton")
    rows, weight, offsets, grad = tensors("dropped", 9, device)
    ours_in = leaves(rows, weight)

    def product(rows, weight):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return grouped_matmul(rows, weight, offsets, backend="triton")

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    ours, plain = compiled(*ours_in), product(*ours_in)
    assert torch.equal(ours, plain)
    for a, b in zip(gradients(ours, grad, *ours_in), gradients(plain, grad, *ours_in), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("passes", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_equal_calls_give_equal_bits(device, backend, passes):
    results = []
    for _ in range(passes):
        rows, weight, offsets, grad = tensors("random", 20, device)
        ours_in = leaves(rows, weight)
        out = grouped_matmul(*ours_in, offsets, backend=backend)
        results.append((out, *gradients(out, grad, *ours_in)))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_bits_of_a_row_do_not_depend_on_the_number_of_rows(device):
    pytest.importorskip("triton")
    rows, weight, _, _ = tensors("random", 63, device)
    whole = grouped_matmul(
        rows, weight[:1], torch.tensor([0, 189], device=device), backend="triton"
    )
    # From whole tiles on: NumPy's matmul, in the interpreter, rounds by the place in a block.
    for first, end in ((0, 1), (0, 23), (64, 150), (128, 189)):
        offsets = torch.tensor([0, end - first], device=device)
        part = grouped_matmul(rows[first:end], weight[:1], offsets, backend="triton")
        assert torch.equal(part, whole[first:end])


def test_map_of_tiles_covers_every_row_once(device):
    triton = pytest.importorskip("kernels.grouped_matmul_triton")
    for counts, unused in (([3, 0, 64, 65, 1], 70), ([0, 0], 5), ([128], 0), ([1] * 40, 0)):
        offsets = torch.tensor([0, *counts], device=device).cumsum(0)
        num_rows = sum(counts) + unused
        groups = triton.Groups(offsets, num_rows)
        covered = [-1] * num_rows
        for expert, first, end in groups.tile_map(64).T.tolist():
            for row in range(first, min(first + 64, end)):
                assert covered[row] == -1
                covered[row] = expert
        expected = [e for e, count in enumerate([*counts, unused]) for _ in range(count)]
        assert covered == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_never_wait_for_the_gpu(device):
    rows, weight, offsets, grad = tensors("dropped", 63, device)
    ours_in = leaves(rows, weight)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            gradients(grouped_matmul(*ours_in, offsets, backend="triton"), grad, *ours_in)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_matrices_and_rows_between_guards_of_nan(device, backend):
    rows, weight, offsets, grad = tensors("dropped", 63, device)

    def guarded(tensor):
        nan = torch.full_like(tensor[:2], torch.nan)
        return torch.cat([nan, tensor, nan])[2:-2]

    plain_in, ours_in = leaves(rows, weight), [guarded(t).requires_grad_() for t in (rows, weight)]
    plain, ours = (grouped_matmul(*t, offsets, backend=backend) for t in (plain_in, ours_in))
    expected = plain, *gradients(plain, grad, *plain_in)
    actual = ours, *gradients(ours, guarded(grad), *ours_in)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("seed", seeds(80))
def test_random_shapes_equal_float64(device, backend, seed):
    generator = torch.Generator().manual_seed(seed)
    d_in, d_out = torch.randint(1, 140, (2,), generator=generator).tolist()
    num_tokens = random_tokens(seed)
    if seed % 4 == 2 and num_tokens > 1:
        check_bfloat16(device, backend, seed, num_tokens, d_in, d_out)
    else:
        check(device, backend, seed, num_tokens, d_in, d_out)
