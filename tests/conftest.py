"""What all tests share: the table of tolerances, the device, seeds, threads and routing cases.

Imports only torch, triton, numpy and pytest, as `test_kernel_*.py` do: they also run on a bare
machine with a GPU.
"""

import importlib.util
import os
import shutil
import subprocess
from typing import Any

import pytest
import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON and not torch.cuda.is_available():
    # Before any kernel is imported: without a GPU, Triton's kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from interpreter import install

    install()

# ||ours - expected|| / ||expected||, forward and each gradient, against float64.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
# In bfloat16 the error is at most the larger of this and twice that of PyTorch's own bfloat16.
BFLOAT16_FLOOR = 4e-3

NUM_TOKENS = (0, 1, 63, 128, 1000)

# Assignments that break dispatch kernels: (E, K) of each.
ROUTINGS = {
    "random": (7, 3),
    "idle experts": (9, 3),
    "one expert": (1, 1),
    "all to one expert": (5, 1),
    "all experts": (4, 4),
    "dropped": (7, 3),
    "nothing assigned": (3, 2),
}

# Tensors here are tiny: on a busy machine two threads wait for each other seven times as long.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(20)


@pytest.fixture
def run_in(tmp_path, monkeypatch):
    """Work in an empty directory, so that errors name `x.yaml` alone."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["torch", "triton"])
def backend(request) -> str:
    """Each of the two implementations of a kernel; Triton's on a GPU or in the interpreter."""
    if request.param == "triton" and not HAS_TRITON:
        pytest.skip("triton is not installed")
    return request.param


@pytest.fixture
def compiler(monkeypatch):
    """A C++ compiler for `torch.compile`, which gets all that it could compile."""
    from kernels.launch import has_compiler

    if not has_compiler():
        pytest.skip("no C++ compiler")
    monkeypatch.setattr("kernels.swiglu_torch.MIN_ACTIVATIONS", 0)


@pytest.fixture
def poisoned_memory():
    """Fill every tensor that is allocated without values with NaN: what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def onednn(monkeypatch):
    """Large float32 products go to oneDNN, also where MKL would be the faster one."""
    # Not before the interpreter is chosen, above.
    from kernels import matmul

    if not matmul.can_use_onednn():
        pytest.skip("oneDNN does not multiply float32 on this CPU")
    monkeypatch.setattr(matmul, "prefers_onednn", lambda: True)


@pytest.fixture
def always_onednn(onednn, monkeypatch):
    """All float32 products go to oneDNN, and experts' rows are padded, however few there are."""
    from kernels import grouped_matmul, matmul

    monkeypatch.setattr(matmul, "MIN_MULTIPLICATIONS", 1)
    monkeypatch.setattr(matmul, "MIN_GRADIENT_SIZE", 1)
    monkeypatch.setattr(grouped_matmul, "PADDED_ROWS", 4)


@pytest.fixture
def always_batched(monkeypatch):
    """Experts that have rows share batched matmuls with their neighbours, in any dtype on a CPU,
    however few and uneven their rows are."""
    from kernels import grouped_matmul, matmul

    def quantum(num_rows, num_experts, x):
        return 4 if x.device.type == "cpu" else 1

    monkeypatch.setattr(matmul, "prefers_onednn", lambda: False)
    monkeypatch.setattr(grouped_matmul, "row_quantum", quantum)
    monkeypatch.setattr(grouped_matmul, "MAX_PADDING", 100)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 3 MB, where the system lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not permitted; the test with a file size limit stands in")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def relative_error(actual: Tensor, expected: Tensor, least: float = 1e-30) -> float:
    """||actual - expected|| / max(||expected||, least) in float64; 0 for two empty tensors.

    least: a norm below which the difference counts as it stands, where 0 is expected.
    """
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    difference = torch.linalg.vector_norm(actual - expected).item()
    return difference / max(torch.linalg.vector_norm(expected).item(), least)


def assert_equals(
    actual: Tensor, expected: Tensor, what: str = "", *, least: float = 1e-30
) -> None:
    """Within the table's tolerance of the dtype of `actual`. NaN never is."""
    error = relative_error(actual, expected, least)
    assert error <= TOLERANCE[actual.dtype], f"{what}: relative error {error:.2e}"


def assert_bfloat16(ours: Tensor, eager: Tensor, expected: Tensor, what: str = "") -> None:
    """The error of `ours` is near that of PyTorch's own bfloat16 (`eager`)."""
    error = relative_error(ours, expected)
    bound = max(BFLOAT16_FLOOR, 2 * relative_error(eager, expected))
    assert error <= bound, f"{what}: relative error {error:.2e}, bound {bound:.2e}"


def randn(*shape: int, seed: int, device: torch.device | str = "cpu", **kwargs) -> Tensor:
    """Normal values of a stream of their own, equal on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, **kwargs).to(device)


def seeds(count: int, quick: tuple[int, ...] = (0, 1, 2, 3, 4, 5)) -> list[Any]:
    """Seeds of generated cases, as parameters of a test; all but the `quick` ones are slow."""
    return [
        pytest.param(seed, marks=() if seed in quick else pytest.mark.slow) for seed in range(count)
    ]


def random_tokens(seed: int) -> int:
    """From 0 to 139, and often one of the two edges."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return (0, 1)[seed % 2] if seed % 20 < 2 else int(torch.randint(140, (), generator=generator))


def random_assignments(
    seed: int, num_tokens: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, int]:
    """As `assignments`, with E from 1 to 12 and K from 1 to E.

    By the seed: any experts; some idle; all tokens to the same K; some assignments dropped.
    """
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    num_experts = number(1, 12)
    top_k = number(1, num_experts)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    order = torch.randperm(num_experts, generator=generator)
    if seed % 4 == 1:
        scores[:, order[top_k:][: number(0, num_experts)]] = -1
    if seed % 4 == 2:
        scores[:, order[:top_k]] += 1
    indices = scores.argsort(-1, descending=True)[:, :top_k]
    weights = torch.rand(num_tokens, top_k, generator=generator) + 0.1
    if seed % 4 == 3:
        indices[torch.rand(num_tokens, top_k, generator=generator) < 0.3] = -1
    return indices.to(device), weights.masked_fill(indices < 0, 0).to(device), num_experts


def assignments(
    case: str | int, num_tokens: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, int]:
    """(topk_indices (T, K), topk_weights (T, K) float32, E) of a case of ROUTINGS, or of a seed."""
    if isinstance(case, int):
        return random_assignments(case, num_tokens, device)
    num_experts, top_k = ROUTINGS[case]
    generator = torch.Generator().manual_seed(7)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    if case == "idle experts":
        # The first, the last, and two neighbours in between.
        scores[:, [0, 3, 4, 8]] = -1
    if case == "all to one expert":
        scores[:, 3] = 2
    indices = scores.argsort(-1, descending=True)[:, :top_k]
    weights = torch.rand(num_tokens, top_k, generator=generator) + 0.1
    if case == "dropped":
        indices[torch.rand(num_tokens, top_k, generator=generator) < 0.3] = -1
    if case == "nothing assigned":
        indices = torch.full_like(indices, -1)
    return indices.to(device), weights.masked_fill(indices.cpu() < 0, 0).to(device), num_experts


def gradients(outputs: Tensor, grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of sum(outputs * grad) with respect to each input."""
    return torch.autograd.grad(outputs, inputs, grad.to(outputs.dtype))


def leaves(*tensors: Tensor, dtype: torch.dtype | None = None) -> Any:
    """Copies that want a gradient."""
    return tuple(t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in tensors)
