"""Is the loss without logits the loss with logits, and are its gradients?"""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    NUM_TOKENS,
    assert_bfloat16,
    assert_equals,
    gradients,
    leaves,
    randn,
    relative_error,
    seeds,
)

from kernels import cross_entropy
from kernels.cross_entropy import linear_cross_entropy

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # NumPy's, in the interpreter, where a test puts in NaN or infinity.
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),
]
D, V = 17, 131


@pytest.fixture(params=[1, 100 * V, 1 << 22])
def block_elements(request, monkeypatch):
    """Blocks of 64 rows (the least), of about 100, and all rows in one."""
    monkeypatch.setattr(cross_entropy, "BLOCK_ELEMENTS", request.param)
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", request.param)
    monkeypatch.setattr(cross_entropy, "MIN_CHUNK_ROWS", 64)


def inputs(num_tokens, device, ignored=0.2):
    """(x, weight, labels), a share of them -100."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(V, (num_tokens,), generator=generator)
    labels[torch.rand(num_tokens, generator=generator) < ignored] = -100
    x = randn(num_tokens, D, seed=2, device=device)
    return x, randn(V, D, seed=3, device=device), labels.to(device)


def oracle(x, weight, labels, z_loss_weight=0.0, ignore_index=-100):
    """(loss, z_loss) with PyTorch's own cross entropy on all the logits."""
    logits = (x @ weight.T)[labels != ignore_index]
    if len(logits) == 0:
        return (x.sum() + weight.sum()) * 0, x.new_zeros(())
    z_loss = z_loss_weight * torch.logsumexp(logits, -1).square().mean()
    return F.cross_entropy(logits, labels[labels != ignore_index]) + z_loss, z_loss


@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("z_loss_weight", [0.0, 0.1])
def test_loss_and_gradients_equal_float64(
    device, backend, block_elements, num_tokens, z_loss_weight
):
    x, weight, labels = inputs(num_tokens, device)
    exact_in, ours_in = leaves(x, weight, dtype=torch.float64), leaves(x, weight)
    exact, exact_z = oracle(*exact_in, labels, z_loss_weight)
    ours = linear_cross_entropy(*ours_in, labels, z_loss_weight=z_loss_weight, backend=backend)
    assert ours.loss.dtype == ours.z_loss.dtype == torch.float32
    assert int(ours.num_tokens) == int((labels != -100).sum())
    assert_equals(ours.loss, exact, "loss")
    assert_equals(ours.z_loss, exact_z, "z_loss")
    # A factor, as a share of a batch gives it.
    for name, actual, expected in zip(
        ("x", "weight"),
        torch.autograd.grad(ours.loss * 0.3, ours_in),
        torch.autograd.grad(exact * 0.3, exact_in),
        strict=True,
    ):
        assert_equals(actual, expected, name)


def test_products_by_onednn_equal_float64(device, always_onednn):
    test_loss_and_gradients_equal_float64(device, "torch", None, 128, 0.1)


def test_loss_of_equal_logits_is_log_vocabulary(device, backend):
    x, weight, labels = inputs(63, device)
    ours = linear_cross_entropy(x * 0, weight, labels, z_loss_weight=0.5, backend=backend)
    assert float(ours.z_loss) == pytest.approx(0.5 * math.log(V) ** 2, rel=1e-6)
    assert float(ours.loss - ours.z_loss) == pytest.approx(math.log(V), rel=1e-6)


def test_every_label_ignored_is_zero_with_zero_gradient(device, backend):
    x, weight, labels = inputs(63, device)
    x, weight = leaves(x, weight)
    ours = linear_cross_entropy(
        x, weight, torch.full_like(labels, -100), z_loss_weight=0.1, backend=backend
    )
    assert ours.loss.item() == ours.z_loss.item() == ours.num_tokens.item() == 0
    ours.loss.backward()
    assert torch.count_nonzero(x.grad) == torch.count_nonzero(weight.grad) == 0


def test_another_ignore_index(device, backend):
    x, weight, labels = inputs(63, device, ignored=0)
    ours = linear_cross_entropy(x, weight, labels, ignore_index=int(labels[3]), backend=backend)
    exact, _ = oracle(x.double(), weight.double(), labels, ignore_index=int(labels[3]))
    assert int(ours.num_tokens) < 63
    assert_equals(ours.loss, exact)


@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_confident_and_huge_logits_stay_exact(device, backend, size):
    x, weight, labels = inputs(63, device)
    weight = weight * size
    exact_in, ours_in = leaves(x, weight, dtype=torch.float64), leaves(x, weight)
    exact, _ = oracle(*exact_in, labels)
    ours = linear_cross_entropy(*ours_in, labels, backend=backend)
    assert_equals(ours.loss, exact)


def test_gradcheck():
    x, weight, labels = inputs(7, "cpu")
    x, weight = leaves(x[:, :3], weight[:5, :3], dtype=torch.float64)
    labels = labels.clamp(max=4)
    assert torch.autograd.gradcheck(
        lambda x, w: linear_cross_entropy(x, w, labels, z_loss_weight=0.1).loss, [x, weight]
    )


def test_bfloat16_by_autocast_is_as_exact_as_eager(device, backend, block_elements):
    x, weight, labels = inputs(300, device)
    ours_in, eager_in = leaves(x, weight), leaves(x, weight)
    exact_in = leaves(x, weight, dtype=torch.float64)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours = linear_cross_entropy(*ours_in, labels, backend=backend).loss
        theirs = F.cross_entropy(F.linear(*eager_in), labels)
    exact, _ = oracle(*exact_in, labels)
    assert ours.dtype == torch.float32
    assert_bfloat16(ours, theirs, exact, "loss")
    one = torch.ones((), device=device)
    ours_grads = gradients(ours, one, *ours_in)
    assert {g.dtype for g in ours_grads} == {torch.float32}
    for name, *triple in zip(
        ("x", "weight"),
        ours_grads,
        gradients(theirs, one, *eager_in),
        gradients(exact, one, *exact_in),
        strict=True,
    ):
        assert_bfloat16(*triple, name)


def test_bfloat16_tensors_without_autocast(device, backend):
    x, weight, labels = inputs(63, device)
    narrow = leaves(x.bfloat16(), weight.bfloat16())
    loss = linear_cross_entropy(*narrow, labels, backend=backend).loss
    loss.backward()
    assert [t.grad.dtype for t in narrow] == [torch.bfloat16] * 2
    assert relative_error(loss, oracle(*[t.double() for t in narrow], labels)[0]) < 1e-2


def test_a_factor_of_the_loss_is_not_rounded_to_bfloat16(device, backend):
    x, weight, labels = inputs(63, device)
    x, weight = leaves(x, weight)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = linear_cross_entropy(x, weight, labels, backend=backend).loss
    # bfloat16 knows no number between 256 and 258.
    plain, scaled = (
        torch.autograd.grad(loss * factor, [x, weight], retain_graph=True) for factor in (1, 257)
    )
    for grad, larger in zip(plain, scaled, strict=True):
        assert_equals(larger, grad * 257)


def test_float16_gradients_survive_a_loss_scale(device, backend):
    x, weight, labels = inputs(1000, device)
    narrow = leaves(x.half() / 16, weight.half() / 16)
    exact_in = leaves(*narrow, dtype=torch.float64)
    loss = linear_cross_entropy(*narrow, labels, backend=backend).loss
    grads = torch.autograd.grad(loss * 65536.0, narrow)
    expected = torch.autograd.grad(oracle(*exact_in, labels)[0] * 65536.0, exact_in)
    for actual, right in zip(grads, expected, strict=True):
        assert actual.dtype == torch.float16
        assert relative_error(actual, right) < 4e-3


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_a_second_derivative_raises(device, backend, factor):
    x, weight, labels = inputs(9, device)
    x, weight = leaves(x, weight)
    loss = linear_cross_entropy(x, weight, labels, backend=backend).loss
    with pytest.raises(RuntimeError, match="differentiated again"):
        torch.autograd.grad(loss * factor, [x, weight], create_graph=True)


def test_kernels_are_launched_on_the_device_of_x(device, monkeypatch):
    triton = pytest.importorskip("kernels.cross_entropy_triton")
    x, weight, labels = inputs(9, device)
    entered = []
    monkeypatch.setattr(triton, "on_device_of", lambda t: entered.append(t) or nullcontext())
    linear_cross_entropy(x, weight, labels, backend="triton")
    assert [t.data_ptr() for t in entered] == [x.data_ptr()]


def test_a_graph_that_is_kept_can_be_walked_twice(device, backend):
    x, weight, labels = inputs(63, device)
    x, weight = leaves(x, weight)
    loss = linear_cross_entropy(x, weight, labels, backend=backend).loss
    loss.backward(retain_graph=True)
    once = x.grad.clone(), weight.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * once[0])
    assert torch.equal(weight.grad, 2 * once[1])


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_gradient_of_one_input_alone(device, backend, wanted):
    x, weight, labels = inputs(63, device)
    both = leaves(x, weight)
    expected = torch.autograd.grad(linear_cross_entropy(*both, labels, backend=backend).loss, both)
    (one,) = leaves({"x": x, "weight": weight}[wanted])
    pair = (one, weight) if wanted == "x" else (x, one)
    (grad,) = torch.autograd.grad(linear_cross_entropy(*pair, labels, backend=backend).loss, [one])
    assert torch.equal(grad, expected[0 if wanted == "x" else 1])


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_the_gradient_of_a_frozen_input_is_neither_computed_nor_kept(
    device, backend, wanted, monkeypatch
):
    x, weight, labels = inputs(63, device)
    (x if wanted == "x" else weight).requires_grad_()
    products, matmul, mm = [], cross_entropy.matmul, torch.mm
    if backend == "torch":
        monkeypatch.setattr(
            cross_entropy, "matmul", lambda *a, **k: products.append(1) or matmul(*a, **k)
        )
    else:
        monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append(1) or mm(*a, **k))
        triton = pytest.importorskip("kernels.cross_entropy_triton")
        add = triton._add_matmul
        monkeypatch.setattr(triton, "_add_matmul", lambda *a: products.append(1) or add(*a))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        linear_cross_entropy(x, weight, labels, backend=backend)
    # The logits, and one gradient.
    assert len(products) == 2
    assert kept == [(63, D) if wanted == "x" else (V, D), ()]


def test_without_gradients_none_are_computed(device, monkeypatch):
    x, weight, labels = inputs(63, device)
    x, weight = leaves(x, weight)
    products, matmul = [], cross_entropy.matmul

    def count(*arguments, **options):
        products.append(matmul(*arguments, **options))
        return products[-1]

    monkeypatch.setattr(cross_entropy, "matmul", count)
    with torch.no_grad():
        ours = linear_cross_entropy(x, weight, labels)
    assert len(products) == 1  # the logits
    assert torch.equal(ours.loss, linear_cross_entropy(x, weight, labels).loss)
    assert len(products) == 4  # and those again, and two gradients


def test_noncontiguous_inputs(device, backend):
    x, weight, labels = inputs(63, device)
    spread = torch.stack([labels, labels], -1)[:, 0]
    ours_in = leaves(x, weight)
    strided = [t.detach().T.contiguous().T.requires_grad_() for t in ours_in]
    plain, ours = (
        linear_cross_entropy(*ours_in, labels, backend=backend).loss,
        linear_cross_entropy(*strided, spread, backend=backend).loss,
    )
    assert_equals(ours, plain)
    for a, b in zip(
        torch.autograd.grad(ours, strided), torch.autograd.grad(plain, ours_in), strict=True
    ):
        assert_equals(a, b)


def test_wrong_shapes_are_named():
    x, weight, labels = inputs(5, "cpu")
    cases = [
        ((x, weight[0], labels), "weight has shape (17,), needs (any, any)"),
        ((x[:, :3], weight, labels), "x has shape (5, 3), needs (any, 17)"),
        ((x, weight, labels[:4]), "labels has shape (4,), needs (5)"),
        (
            (x, weight, labels.to("meta")),
            "tensors on different devices: x on cpu, weight on cpu, labels on meta",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError) as caught:
            linear_cross_entropy(*arguments)
        assert str(caught.value) == f"linear_cross_entropy: {message}"


def numpy_oracle(x, weight, labels, z_loss_weight):
    """NumPy float64, a row at a time: (loss, grad_x, grad_weight)."""
    x, weight, labels = (
        np.asarray(t.double() if t.is_floating_point() else t)
        for t in (x.cpu(), weight.cpu(), labels.cpu())
    )
    count = max(1, (labels != -100).sum())
    loss, grad_x, grad_weight = 0.0, np.zeros_like(x), np.zeros_like(weight)
    for t in np.flatnonzero(labels != -100):
        z = weight @ x[t]
        lse = z.max() + np.log(np.exp(z - z.max()).sum())
        loss += (lse - z[labels[t]] + z_loss_weight * lse**2) / count
        dz = np.exp(z - lse) * (1 + 2 * z_loss_weight * lse) / count
        dz[labels[t]] -= 1 / count
        grad_x[t] = dz @ weight
        grad_weight += np.outer(dz, x[t])
    return [torch.from_numpy(np.asarray(a)) for a in (loss, grad_x, grad_weight)]


def test_loss_and_gradients_equal_numpy_by_the_row(device, backend):
    x, weight, labels = inputs(63, device)
    ours_in = leaves(x, weight)
    ours = linear_cross_entropy(*ours_in, labels, z_loss_weight=0.1, backend=backend).loss
    expected = numpy_oracle(x, weight, labels, 0.1)
    for a, b in zip((ours, *torch.autograd.grad(ours, ours_in)), expected, strict=True):
        assert_equals(a, b)


@pytest.mark.parametrize("num_classes", [1, 2, 16, 63, 64, 65, 1000])
def test_any_size_of_vocabulary(device, backend, num_classes):
    x, weight = randn(20, 9, seed=1, device=device), randn(num_classes, 9, seed=2, device=device)
    labels = torch.arange(20, device=device) * 7 % num_classes
    ours_in = leaves(x, weight)
    ours = linear_cross_entropy(*ours_in, labels, z_loss_weight=0.1, backend=backend).loss
    expected = numpy_oracle(x, weight, labels, 0.1)
    for a, b in zip((ours, *torch.autograd.grad(ours, ours_in)), expected, strict=True):
        assert_equals(a, b)


def test_labels_out_of_range_are_refused_where_asked(device, backend):
    x, weight, labels = inputs(9, device)
    labels[[4, 6]] = torch.tensor([V, -7], device=device)
    message = f"2 labels are out of range, as {V}; they must be from 0 to {V - 1}, or ignore_index"
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(x, weight, labels, backend=backend, debug=True)
    labels[[4, 6]] = torch.tensor([V - 1, -100], device=device)
    sound = linear_cross_entropy(x, weight, labels, backend=backend, debug=True)
    assert torch.equal(sound.loss, linear_cross_entropy(x, weight, labels, backend=backend).loss)


@pytest.mark.parametrize("label", [V, -1, 2**40])
def test_a_label_out_of_range_makes_the_loss_nan_and_reads_nothing(device, label):
    pytest.importorskip("triton")
    x, weight, labels = inputs(9, device, ignored=0)
    labels[4] = label
    assert linear_cross_entropy(x, weight, labels, backend="triton").loss.isnan()


@pytest.fixture
def chunks(monkeypatch):
    """A list of the logits of each chunk: (shape, address of its memory, bytes of it)."""
    triton = pytest.importorskip("kernels.cross_entropy_triton")
    seen, run = [], triton._launch_softmax

    def record(logits, *arguments):
        memory = logits.untyped_storage()
        seen.append((tuple(logits.shape), memory.data_ptr(), memory.nbytes()))
        run(logits, *arguments)

    monkeypatch.setattr(triton, "_launch_softmax", record)
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 64 * V)
    monkeypatch.setattr(cross_entropy, "MIN_CHUNK_ROWS", 16)
    return seen


def test_logits_never_take_more_than_one_chunk(device, chunks):
    x, weight, labels = inputs(170, device)
    x, weight = leaves(x, weight)
    linear_cross_entropy(x, weight, labels, backend="triton").loss.backward()
    assert [shape for shape, *_ in chunks] == [(64, V), (64, V), (42, V)]
    # One buffer, of rows padded to 16 elements.
    assert len({address for _, address, _ in chunks}) == 1
    assert {size for *_, size in chunks} == {64 * 144 * 4}


def test_chunks_have_a_least_and_a_most_number_of_rows(device, chunks, monkeypatch):
    x, weight, labels = inputs(170, device)
    monkeypatch.setattr(cross_entropy, "MIN_CHUNK_ROWS", 112)
    linear_cross_entropy(x, weight, labels, backend="triton")
    monkeypatch.setattr(cross_entropy, "MAX_CHUNK_ROWS", 100)
    linear_cross_entropy(x, weight, labels, backend="triton")
    assert [rows for (rows, _), *_ in chunks] == [112, 58, 96, 74]


def test_triton_without_gradients_does_one_matmul_a_chunk(device, chunks, monkeypatch):
    x, weight, labels = inputs(170, device)
    x, weight = leaves(x, weight)
    with_gradients = linear_cross_entropy(x, weight, labels, backend="triton")
    calls, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: calls.append(1) or mm(*a, **k))
    with torch.no_grad():
        ours = linear_cross_entropy(x, weight, labels, backend="triton")
    assert len(calls) == 3
    assert torch.equal(ours.loss, with_gradients.loss)
    linear_cross_entropy(x, weight, labels, backend="triton")
    assert len(calls) == 9


def test_rows_around_the_inputs_are_not_read(device, backend):
    x, weight, labels = inputs(40, device)
    wide_x = torch.full((60, D + 6), torch.nan, device=device)
    wide_w = torch.full((V + 9, D + 2), torch.nan, device=device)
    wide_labels = torch.full((60,), 2**40, device=device)
    wide_x[9:49, 3 : 3 + D], wide_w[4 : 4 + V, 1 : 1 + D], wide_labels[5:45] = x, weight, labels
    views = wide_x[9:49, 3 : 3 + D], wide_w[4 : 4 + V, 1 : 1 + D]
    ours_in = [view.detach().requires_grad_() for view in views]
    ours = linear_cross_entropy(*ours_in, wide_labels[5:45], backend=backend).loss
    expected = numpy_oracle(x, weight, labels, 0.0)
    for a, b in zip((ours, *torch.autograd.grad(ours, ours_in)), expected, strict=True):
        assert_equals(a, b)


def kernel_rows(logits, labels, device, wants_grad=True, ignore_index=-100):
    """The kernel alone on a copy of the logits, V padded: (losses, gradient)."""
    triton = pytest.importorskip("kernels.cross_entropy_triton")
    rows, classes = logits.shape
    padded = torch.full((rows, -(-classes // 16) * 16), torch.nan, dtype=logits.dtype)
    padded = padded.to(device)
    padded[:, :classes] = logits
    losses = torch.full((2, rows), torch.nan, device=device)
    options = 0, ignore_index, 0.1, wants_grad
    triton._launch_softmax(padded[:, :classes], labels, losses, *options)
    return losses, padded[:, :classes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_a_row_do_not_depend_on_the_number_of_rows(device, dtype):
    logits = randn(150, V, seed=1, device=device).to(dtype)
    labels = torch.arange(150, device=device) % V
    losses, grads = kernel_rows(logits, labels, device)
    for rows in (slice(0, 1), slice(5, 98), slice(149, 150)):
        part = kernel_rows(logits[rows], labels[rows].clone(), device)
        assert torch.equal(part[0], losses[:, rows])
        assert torch.equal(part[1], grads[rows])
    # Nor on whether a gradient is wanted, without which the logits stay.
    alone = kernel_rows(logits, labels, device, wants_grad=False)
    assert torch.equal(alone[0], losses)
    assert torch.equal(alone[1], logits)


def test_ignored_rows_give_zeros_whatever_they_hold(device):
    logits = randn(5, V, seed=1, device=device)
    logits[2], logits[3, 1] = torch.nan, torch.inf
    labels = torch.tensor([3, 4, -100, -100, 5], device=device)
    losses, grads = kernel_rows(logits, labels, device)
    assert losses.isfinite().all()
    assert torch.count_nonzero(losses[:, 2:4]) == torch.count_nonzero(grads[2:4]) == 0
    assert grads.isfinite().all()


def test_addresses_beyond_two_to_the_31(device):
    triton = pytest.importorskip("kernels.cross_entropy_triton")
    # Untouched pages of zeros cost nothing on a CPU: a vocabulary of 17, rows far apart.
    stride = 2**30 + 16
    far = torch.from_numpy(np.zeros(2 * stride + 32, dtype=np.int16)).to(device)
    far = far.view(torch.bfloat16).as_strided((3, 17), (stride, 1))
    logits = randn(3, 17, seed=1, device=device).bfloat16()
    far.copy_(logits)
    labels, losses = torch.tensor([3, -100, 16], device=device), torch.zeros(2, 3, device=device)
    expected = kernel_rows(logits, labels, device)
    triton._launch_softmax(far, labels, losses, 0, -100, 0.1, True)
    assert torch.equal(losses, expected[0])
    assert torch.equal(far, expected[1])


@pytest.mark.parametrize("num_classes", [200, 5000, 256_003])
def test_tiles_of_real_chips_give_the_same_rows(device, monkeypatch, num_classes):
    triton = pytest.importorskip("kernels.cross_entropy_triton")
    tile = triton._tile(num_classes, "sm_90")
    assert tile.blocks["BLOCK_CLASSES"] == min(4096, 2 ** math.ceil(math.log2(num_classes)))
    monkeypatch.setattr(triton, "_tile", lambda *_: tile)
    logits = randn(5, num_classes, seed=1, device=device) * 3
    labels = torch.tensor([0, num_classes - 1, -100, num_classes // 2, 7], device=device)
    losses, grads = kernel_rows(logits, labels, device)
    wide = logits.double()
    lse, counted = wide.logsumexp(-1), labels >= 0
    own = wide.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    assert_equals(losses[0], (lse - own) * counted)
    assert_equals(losses[1], lse.square() * counted)
    expected = wide.softmax(-1) * (1 + 2 * 0.1 * lse)[:, None]
    expected[torch.arange(5), labels.clamp(min=0)] -= 1
    assert_equals(grads, expected * counted[:, None])


def test_operator_is_registered_soundly(device):
    triton = pytest.importorskip("kernels.cross_entropy_triton")
    x, weight, labels = inputs(9, device)
    ours_in = leaves(x, weight)
    for dtype in (torch.float32, torch.bfloat16):
        arguments = *ours_in, labels, -100, 0.1, dtype, True, True, 16
        torch.library.opcheck(triton.linear_cross_entropy_op, arguments)
    arguments = x, weight, labels, -100, 0.1, torch.float32, False, False, 16
    torch.library.opcheck(triton.linear_cross_entropy_op, arguments)


def test_compiled_graphs_hold_the_operator_whole(device):
    pytest.importorskip("triton")
    x, weight, labels = inputs(20, device)
    x, weight = leaves(x, weight)

    def loss(x, weight):
        return linear_cross_entropy(x, weight, labels, z_loss_weight=0.1, backend="triton").loss

    losses = loss(x, weight), torch.compile(loss, fullgraph=True, backend="aot_eager")(x, weight)
    assert torch.equal(*losses)
    for a, b in zip(
        *[torch.autograd.grad(value * 0.3, [x, weight]) for value in losses], strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("count", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_equal_passes_give_equal_bits(device, chunks, count):
    x, weight, labels = inputs(150, device)
    x, weight = leaves(x, weight)

    def once():
        loss = linear_cross_entropy(x, weight, labels, z_loss_weight=0.1, backend="triton").loss
        return loss, *torch.autograd.grad(loss, [x, weight])

    first, *others = [once() for _ in range(count)]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("seed", seeds(80))
def test_random_cases_equal_numpy(device, backend, monkeypatch, seed):
    rng = np.random.default_rng(seed)
    num_tokens, hidden, classes = (int(n) for n in rng.integers(1, (200, 40, 400)))
    monkeypatch.setattr(cross_entropy, "MIN_CHUNK_ROWS", int(rng.integers(16, 128)))
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 1)
    x = randn(num_tokens, hidden, seed=seed, device=device)
    weight = randn(classes, hidden, seed=seed + 1, device=device)
    labels = torch.from_numpy(rng.integers(0, classes, num_tokens))
    labels[torch.from_numpy(rng.random(num_tokens) < rng.choice([0.0, 0.3, 1.0]))] = -100
    labels, z_loss_weight = labels.to(device), float(rng.choice([0.0, 0.01, 0.5]))
    options = {"z_loss_weight": z_loss_weight, "backend": backend, "debug": bool(seed % 2)}
    ours_in = leaves(x, weight)
    expected = numpy_oracle(x, weight, labels, z_loss_weight)
    if seed % 4 == 2:
        eager_in = leaves(x, weight)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            ours = linear_cross_entropy(*ours_in, labels, **options).loss
            theirs = oracle(*eager_in, labels, z_loss_weight)[0]
        results = ours, *torch.autograd.grad(ours, ours_in)
        library = theirs, *torch.autograd.grad(theirs, eager_in)
        for triple in zip(results, library, expected, strict=True):
            assert_bfloat16(*triple)
        return
    ours = linear_cross_entropy(*ours_in, labels, **options).loss
    # One class and no z-loss: the loss is 0, a difference of equal numbers.
    for a, b in zip((ours, *torch.autograd.grad(ours, ours_in)), expected, strict=True):
        assert_equals(a, b, least=1e-2)
