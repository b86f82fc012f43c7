"""Do the kernels say which implementation runs, and refuse what none can run?"""

import sys

import pytest
import torch

from kernels.attention import fused_attention
from kernels.cross_entropy import linear_cross_entropy
from kernels.dispatch import DispatchPlan, permute, plan_dispatch, unpermute
from kernels.grouped_matmul import grouped_matmul
from kernels.launch import (
    check_same_device,
    check_shape,
    compute_dtype,
    resolve_backend,
)
from kernels.matmul import linear
from kernels.rms_norm import rms_norm
from kernels.rope import apply_rope
from kernels.routing import fused_topk
from kernels.swiglu_experts import swiglu_experts, swiglu_experts_sorted

ONES = torch.ones
PLAN = plan_dispatch(torch.tensor([[0, 1]]), 2)

CALLS = {
    "fused_topk": lambda **k: fused_topk(ONES(3, 4), 2, **k),
    "grouped_matmul": lambda **k: grouped_matmul(
        ONES(2, 4), ONES(2, 3, 4), PLAN.expert_offsets, **k
    ),
    "swiglu_experts": lambda **k: swiglu_experts(
        ONES(1, 4), ONES(2, 3, 4), ONES(2, 4, 3), ONES(2, 3, 4), PLAN, ONES(1, 2), **k
    ),
    "swiglu_experts_sorted": lambda **k: swiglu_experts_sorted(
        ONES(2, 4), ONES(2, 3, 4), ONES(2, 4, 3), ONES(2, 3, 4), PLAN.expert_offsets, **k
    ),
    "fused_attention": lambda **k: fused_attention(*[ONES(1, 3, 2, 4)] * 3, **k),
    "linear_cross_entropy": lambda **k: linear_cross_entropy(
        ONES(2, 4), ONES(5, 4), torch.tensor([0, 1]), **k
    ),
    "rms_norm": lambda **k: rms_norm(ONES(2, 4), ONES(4), **k),
    "apply_rope": lambda **k: apply_rope(ONES(1, 3, 2, 4), ONES(1, 3, 1, 4), torch.arange(3), **k),
}


# Each kernel with its tensors that hold floating-point numbers, and those that hold integers.
TENSORS = {
    "fused_topk": (lambda *t, **k: fused_topk(t[0], 2, bias=t[1], **k), (3, 4), (4,)),
    "plan_dispatch": (lambda *t, **k: plan_dispatch(*t, 2, **k), PLAN.row_of),
    "permute": (lambda *t, **k: permute(*t, PLAN, **k), (1, 4)),
    "unpermute": (lambda *t, **k: unpermute(t[0], PLAN, t[1], **k), (2, 4), (1, 2)),
    "grouped_matmul": (grouped_matmul, (2, 4), (2, 3, 4), PLAN.expert_offsets),
    "swiglu_experts": (
        lambda *t, **k: swiglu_experts(*t[:4], DispatchPlan(*t[5:]), t[4], **k),
        *((1, 4), (2, 3, 4), (2, 4, 3), (2, 3, 4), (1, 2)),
        *PLAN,
    ),
    "swiglu_experts_sorted": (
        lambda *t, **k: swiglu_experts_sorted(*t[:5], scale=t[5], **k),
        *((2, 4), (2, 3, 4), (2, 4, 3), (2, 3, 4), PLAN.expert_offsets, (2,)),
    ),
    "fused_attention": (
        lambda *t, **k: fused_attention(*t[:3], document_ids=t[3], **k),
        *[(1, 3, 2, 4)] * 3,
        torch.zeros(1, 3, dtype=torch.int32),
    ),
    "linear_cross_entropy": (linear_cross_entropy, (2, 4), (5, 4), torch.tensor([0, 1])),
    "rms_norm": (rms_norm, (2, 4), (4,)),
    "apply_rope": (apply_rope, (1, 3, 2, 4), (1, 3, 1, 4), torch.arange(3)),
    "linear": (lambda *t, backend: linear(*t), (2, 4), (3, 4)),
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("op", TENSORS)
def test_wrong_dtypes_are_refused_by_every_kernel(op, backend, device):
    call, *arguments = TENSORS[op]
    right = [(ONES(t) if isinstance(t, tuple) else t).to(device) for t in arguments]
    call(*right, backend=backend)
    for i, tensor in enumerate(right):
        floating = tensor.is_floating_point()
        needed = "a floating-point dtype" if floating else "integers"
        for dtype in (torch.bool, torch.int64 if floating else torch.float32):
            wrong = [*right[:i], tensor.to(dtype), *right[i + 1 :]]
            with pytest.raises(ValueError, match=rf"^{op}: \S+ is {dtype}, needs {needed}$"):
                call(*wrong, backend=backend)


@pytest.mark.parametrize("op", ["grouped_matmul", "swiglu_experts_sorted"])
@pytest.mark.parametrize("offsets", [[0, 1, 3], [0, 2, 1], [1, 1, 2], [-1, 1, 2]], ids=str)
def test_wrong_offsets_are_refused_where_they_are_looked_at(op, offsets, device):
    call, *arguments = TENSORS[op]
    tensors = [(ONES(t) if isinstance(t, tuple) else t).to(device) for t in arguments]
    wrong = [t if t.is_floating_point() else torch.tensor(offsets, device=device) for t in tensors]
    for options in ({"backend": "torch"}, {"backend": "triton", "debug": True}):
        with pytest.raises(ValueError) as caught:
            call(*wrong, **options)
        assert str(caught.value) == (
            f"{op}: expert_offsets ({offsets}) must ascend from 0 to at most the number of rows (2)"
        )
        call(*tensors, **options)


@pytest.mark.parametrize("op", CALLS)
def test_unknown_backend_is_refused_by_every_kernel(op):
    CALLS[op](backend="torch")
    with pytest.raises(ValueError) as caught:
        CALLS[op](backend="cuda")
    assert (
        str(caught.value)
        == f"{op}: backend ('cuda') must be one of auto, triton, torch, torch_compile"
    )


def test_triton_backend_is_refused_where_there_is_no_kernel():
    message = "op: backend 'triton' has no kernel for this operation; use 'auto' or 'torch'"
    with pytest.raises(ValueError) as caught:
        resolve_backend("op", "triton", ONES(1))
    assert str(caught.value) == message


def test_triton_backend_is_refused_for_cpu_tensors_but_in_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError) as caught:
        resolve_backend("op", "triton", ONES(1), has_triton=True)
    message = (
        "op: backend 'triton' needs CUDA tensors (or TRITON_INTERPRET=1, for tests), got cpu; use "
        "'auto' or 'torch'"
    )
    assert str(caught.value) == message
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("op", "triton", ONES(1), has_triton=True) == "triton"
    assert resolve_backend("op", "auto", ONES(1), has_triton=True) == "torch"


def test_compiled_backend_is_refused_without_a_cpu_or_a_compiler(monkeypatch):
    with pytest.raises(ValueError) as caught:
        resolve_backend("op", "torch_compile", ONES(1).to("meta"))
    assert str(caught.value) == "op: backend 'torch_compile' is for CPUs, got meta; use 'auto'"
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError) as caught:
        resolve_backend("op", "torch_compile", ONES(1))
    message = (
        "op: backend 'torch_compile' needs a C++ compiler, and there is no 'no-such-compiler' "
        "(install it, or name another in CXX); use 'torch'"
    )
    assert str(caught.value) == message


@pytest.mark.parametrize("op", CALLS)
def test_every_kernel_takes_the_compiled_backend(monkeypatch, op):
    """Whether or not it has something to compile."""
    monkeypatch.setenv("CXX", sys.executable)
    CALLS[op](backend="torch_compile")


def test_auto_is_torch_on_a_cpu():
    assert resolve_backend("op", "auto", ONES(1), has_triton=True) == "torch"


def test_check_shape_names_the_tensor_and_what_it_needs():
    check_shape("op", "x", ONES(2, 3), (None, 3))
    for bad in (ONES(2, 4), ONES(3), ONES(1, 2, 3)):
        with pytest.raises(ValueError) as caught:
            check_shape("op", "x", bad, (None, 3))
        assert str(caught.value) == f"op: x has shape {tuple(bad.shape)}, needs (any, 3)"


def test_check_same_device_lists_the_devices():
    check_same_device("op", a=ONES(1), b=None)
    with pytest.raises(ValueError) as caught:
        check_same_device("op", a=ONES(1), b=ONES(1, device="meta"))
    assert str(caught.value) == "op: tensors on different devices: a on cpu, b on meta"


def test_compute_dtype_is_that_of_autocast():
    x = ONES(1)
    assert compute_dtype(x) == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compute_dtype(x) == torch.bfloat16
        assert compute_dtype(x.long()) == torch.int64
        # As PyTorch's own autocast, which leaves double precision alone.
        assert compute_dtype(x.double()) == torch.float64 == (x.double()[None] @ x.double()).dtype
