"""Does the model compute the same on Triton's kernels as on PyTorch's bodies?

On the CPU the kernels run in Triton's interpreter, so the models are tiny.
"""

import pytest
import torch
from conftest import relative_error
from model_cases import tiny_config, tokens

from moe.model import MoETransformer, init_weights

pytest.importorskip("triton")
# NumPy's, in the interpreter, in rows that are masked afterwards.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")

SHAPE = {
    "hidden_size": 32,
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "window": 24},
    "moe": {
        "num_experts": 5,
        "intermediate_size": 24,
        "num_shared_experts": 1,
        "router": {"name": "topk", "top_k": 2, "bias_update_rate": 0.01},
    },
    "lm_z_loss_weight": 1e-3,
    "init_std": 0.3,
}


def model_on(backend, device, **changes):
    model = MoETransformer(tiny_config(**SHAPE | changes, kernel_backend=backend))
    init_weights(model, 0)
    return model.to(device)


def batch(device):
    """Packed documents, and some labels that do not count."""
    ids = tokens(2, 40)
    labels = ids.roll(-1, 1)
    labels[:, -3:] = -100
    documents = (torch.arange(40) >= torch.tensor([[17], [29]])).int()
    return ids.to(device), labels.to(device), documents.to(device)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "moe",
    [
        {"experts": {"name": "swiglu", "save": "x"}},
        {"experts": {"name": "swiglu", "save": "xh"}},
        {"experts": {"name": "relu2"}, "latent_size": 12, "shared_gate": "softmax"},
    ],
    ids=str,
)
def test_loss_and_every_gradient_are_equal_on_both_backends(device, recompute, moe):
    results = {}
    for backend in ("torch", "triton"):
        model = model_on(backend, device, moe=SHAPE["moe"] | moe).train()
        model.activation_checkpointing = recompute
        out = model(*batch(device))
        out.loss.backward()
        results[backend] = out, {name: p.grad for name, p in model.named_parameters()}
    (expected, expected_grads), (out, grads) = results["torch"], results["triton"]
    assert relative_error(out.loss, expected.loss) < 1e-5
    assert relative_error(out.lm_z_loss, expected.lm_z_loss) < 1e-5
    for ours, theirs in zip(out.routings, expected.routings, strict=True):
        assert torch.equal(ours.topk_indices, theirs.topk_indices)
        assert torch.equal(ours.tokens_per_expert, theirs.tokens_per_expert)
    for name, grad in expected_grads.items():
        assert relative_error(grads[name], grad) < 1e-5, name


@pytest.mark.parametrize(
    ("backend", "experts", "expected"),
    [
        ("torch", "relu2", set()),
        ("triton", "swiglu", {"plan_dispatch_op"}),
        ("triton", "relu2", {"plan_dispatch_op", "permute_op", "unpermute_op"}),
    ],
)
def test_dispatch_runs_on_the_backend_of_the_model(device, monkeypatch, backend, experts, expected):
    from kernels import dispatch_triton

    called = set()

    def record(name, op):
        def run(*arguments):
            called.add(name)
            return op(*arguments)

        return run

    for name in ("plan_dispatch_op", "permute_op", "unpermute_op"):
        monkeypatch.setattr(dispatch_triton, name, record(name, getattr(dispatch_triton, name)))
    moe = SHAPE["moe"] | {"experts": {"name": experts}}
    model_on(backend, device, moe=moe)(*batch(device))
    assert called == expected


def test_generation_with_a_cache_equals_the_whole_sequence(device):
    model = model_on("triton", device, attention=SHAPE["attention"] | {"window": None}).eval()
    ids = tokens(1, 9).to(device)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :6])
        rest = model(ids[:, 6:], caches=first.caches)
    assert relative_error(rest.logits, whole[:, 6:]) < 1e-5


def test_bfloat16_loss_is_near_that_of_pytorch(device):
    losses = {}
    for backend in ("torch", "triton"):
        with torch.autocast(device.type, torch.bfloat16):
            losses[backend] = model_on(backend, device).eval()(*batch(device)).loss
    assert relative_error(losses["triton"], losses["torch"]) < 4e-3


def test_training_goes_the_same_way_and_can_change_backend_when_it_resumes(tmp_path, capsys):
    from training_cases import Recorder, run

    losses = {}
    for backend in ("torch", "triton"):
        changes = {"model.kernel_backend": backend, "training.steps": 3, "evaluation.every": 0}
        with Recorder() as recorder:
            assert run(tmp_path / backend, changes) == 0
        assert f"kernels: {backend}" in capsys.readouterr().out
        losses[backend] = [(step.lm_loss, step.gradient_norm) for step in recorder.steps]
    for ours, theirs in zip(losses["triton"], losses["torch"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    # From here on other kernels: the run stays the same.
    changes = {"model.kernel_backend": "torch", "training.steps": 4, "evaluation.every": 0}
    assert run(tmp_path / "triton", changes) == 0
    printed = capsys.readouterr().out
    assert "resuming at step 3" in printed and "model.kernel_backend" in printed
