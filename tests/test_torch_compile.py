"""Does a run on compiled kernels train as one on PyTorch's, and end at once where none compile?"""

import pytest
from training_cases import Recorder, run

import train.device

COMPILED = {
    "model.kernel_backend": "torch_compile",
    "training.device": "cpu",
    "training.steps": 3,
    "evaluation.every": 0,
}
PYTORCH_SAYS = """CppCompileError: C++ compile error

Command:
g++ kernel.cpp -shared

Output:
kernel.cpp:2:10: fatal error: Python.h: No such file or directory
compilation terminated.
"""


def fail(*args, **kwargs):
    raise RuntimeError(PYTORCH_SAYS)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_run_goes_the_same_way(compiler, tmp_path, capsys, precision):
    steps = {}
    for backend in ("torch", "torch_compile"):
        changes = COMPILED | {"model.kernel_backend": backend, "training.precision": precision}
        with Recorder() as recorder:
            assert run(tmp_path / backend, changes) == 0
        printed = capsys.readouterr().out
        assert f"kernels: {backend}," in printed
        assert ("trying to compile" in printed) == (backend == "torch_compile")
        steps[backend] = [(step.lm_loss, step.gradient_norm) for step in recorder.steps]
    for ours, theirs in zip(steps["torch_compile"], steps["torch"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5 if precision == "float32" else 1e-2)


def test_a_compiler_that_fails_is_one_line_before_anything_is_written(
    tmp_path, capsys, monkeypatch
):
    train.device._try_compiler.cache_clear()
    monkeypatch.setattr("train.device.activate_backward", fail)
    monkeypatch.setattr("kernels.launch.has_compiler", lambda: True)
    assert run(tmp_path / "run", COMPILED) == 2
    assert capsys.readouterr().err == (
        "error: model.kernel_backend: torch_compile, but PyTorch cannot compile here "
        "(kernel.cpp:2:10: fatal error: Python.h: No such file or directory); install a C++ "
        "compiler and Python's headers, or set model.kernel_backend: torch\n"
    )
    assert not list((tmp_path / "run").glob("c*"))


def test_without_a_compiler_the_setting_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert run(tmp_path / "run", COMPILED) == 2
    assert capsys.readouterr().err == (
        "error: model.kernel_backend: backend 'torch_compile' needs a C++ compiler, and there is "
        "no 'no-such-compiler' (install it, or name another in CXX); use 'torch'\n"
    )
