"""Is the loss without logits the loss with logits, and are its gradients?"""

import math

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
)

from kernels import cross_entropy
from kernels.cross_entropy import linear_cross_entropy

pytestmark = pytest.mark.usefixtures("poisoned_memory")
D, V = 17, 131


@pytest.fixture(params=[1, 64 * V, 100 * V, 1 << 22])
def block_elements(request, monkeypatch):
    """Blocks of 64 rows (the least), of 100, and all rows in one."""
    monkeypatch.setattr(cross_entropy, "BLOCK_ELEMENTS", request.param)


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
def test_loss_and_gradients_equal_float64(device, block_elements, num_tokens, z_loss_weight):
    x, weight, labels = inputs(num_tokens, device)
    exact_in, ours_in = leaves(x, weight, dtype=torch.float64), leaves(x, weight)
    exact, exact_z = oracle(*exact_in, labels, z_loss_weight)
    ours = linear_cross_entropy(*ours_in, labels, z_loss_weight=z_loss_weight)
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


def test_loss_of_equal_logits_is_log_vocabulary(device):
    x, weight, labels = inputs(63, device)
    ours = linear_cross_entropy(x * 0, weight, labels, z_loss_weight=0.5)
    assert float(ours.z_loss) == pytest.approx(0.5 * math.log(V) ** 2, rel=1e-6)
    assert float(ours.loss - ours.z_loss) == pytest.approx(math.log(V), rel=1e-6)


def test_every_label_ignored_is_zero_with_zero_gradient(device):
    x, weight, labels = inputs(63, device)
    x, weight = leaves(x, weight)
    ours = linear_cross_entropy(x, weight, torch.full_like(labels, -100), z_loss_weight=0.1)
    assert ours.loss.item() == ours.z_loss.item() == ours.num_tokens.item() == 0
    ours.loss.backward()
    assert torch.count_nonzero(x.grad) == torch.count_nonzero(weight.grad) == 0


def test_another_ignore_index(device):
    x, weight, labels = inputs(63, device, ignored=0)
    ours = linear_cross_entropy(x, weight, labels, ignore_index=int(labels[3]))
    exact, _ = oracle(x.double(), weight.double(), labels, ignore_index=int(labels[3]))
    assert int(ours.num_tokens) < 63
    assert_equals(ours.loss, exact)


@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_confident_and_huge_logits_stay_exact(device, size):
    x, weight, labels = inputs(63, device)
    weight = weight * size
    exact_in, ours_in = leaves(x, weight, dtype=torch.float64), leaves(x, weight)
    exact, _ = oracle(*exact_in, labels)
    ours = linear_cross_entropy(*ours_in, labels)
    assert_equals(ours.loss, exact)


def test_gradcheck():
    x, weight, labels = inputs(7, "cpu")
    x, weight = leaves(x[:, :3], weight[:5, :3], dtype=torch.float64)
    labels = labels.clamp(max=4)
    assert torch.autograd.gradcheck(
        lambda x, w: linear_cross_entropy(x, w, labels, z_loss_weight=0.1).loss, [x, weight]
    )


def test_bfloat16_by_autocast_is_as_exact_as_eager(device, block_elements):
    x, weight, labels = inputs(300, device)
    ours_in, eager_in = leaves(x, weight), leaves(x, weight)
    exact_in = leaves(x, weight, dtype=torch.float64)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours = linear_cross_entropy(*ours_in, labels).loss
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


def test_bfloat16_tensors_without_autocast(device):
    x, weight, labels = inputs(63, device)
    narrow = leaves(x.bfloat16(), weight.bfloat16())
    loss = linear_cross_entropy(*narrow, labels).loss
    loss.backward()
    assert [t.grad.dtype for t in narrow] == [torch.bfloat16] * 2
    assert relative_error(loss, oracle(*[t.double() for t in narrow], labels)[0]) < 1e-2


def test_a_graph_that_is_kept_can_be_walked_twice(device):
    x, weight, labels = inputs(63, device)
    x, weight = leaves(x, weight)
    loss = linear_cross_entropy(x, weight, labels).loss
    loss.backward(retain_graph=True)
    once = x.grad.clone(), weight.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * once[0])
    assert torch.equal(weight.grad, 2 * once[1])


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_gradient_of_one_input_alone(device, wanted):
    x, weight, labels = inputs(63, device)
    both = leaves(x, weight)
    expected = torch.autograd.grad(linear_cross_entropy(*both, labels).loss, both)
    (one,) = leaves({"x": x, "weight": weight}[wanted])
    pair = (one, weight) if wanted == "x" else (x, one)
    (grad,) = torch.autograd.grad(linear_cross_entropy(*pair, labels).loss, [one])
    assert torch.equal(grad, expected[0 if wanted == "x" else 1])


def test_without_gradients_none_are_computed(device, monkeypatch):
    x, weight, labels = inputs(63, device)
    x, weight = leaves(x, weight)
    with_gradients = linear_cross_entropy(x, weight, labels)

    def refuse(*arguments, **options):
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(torch, "mm", refuse)
    with torch.no_grad():
        ours = linear_cross_entropy(x, weight, labels)
    assert torch.equal(ours.loss, with_gradients.loss)
    with pytest.raises(AssertionError):
        linear_cross_entropy(x, weight, labels)


def test_noncontiguous_inputs(device):
    x, weight, labels = inputs(63, device)
    spread = torch.stack([labels, labels], -1)[:, 0]
    ours_in = leaves(x, weight)
    strided = [t.detach().T.contiguous().T.requires_grad_() for t in ours_in]
    plain, ours = (
        linear_cross_entropy(*ours_in, labels).loss,
        linear_cross_entropy(*strided, spread).loss,
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
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError) as caught:
            linear_cross_entropy(*arguments)
        assert str(caught.value) == f"linear_cross_entropy: {message}"
