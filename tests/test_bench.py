"""The benchmark tells wrong from right before it tells slow from fast."""

import json

import pytest
import torch

from kernels.bench import (
    Case,
    Contestant,
    Limits,
    copy_rate,
    largest_error,
    leaf,
    main,
    render,
    run_case,
    saved_bytes,
    seconds_of,
)

LIMITS = Limits(1e9, 1e9)


def case(factor: float = 2.0) -> Case:
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    return Case(
        name="doubling",
        ours=lambda x, backend: x * factor,
        leaves=(x,),
        reference=lambda x: x * 2,
        rivals={"another": Contestant(lambda x: x + x, (x,))},
        grad=torch.ones(2),
        tokens=2,
        flops=2.0,
        moved_bytes=16.0,
    )


@pytest.mark.parametrize("factor", [2.1, float("nan")])
def test_a_wrong_result_is_not_timed(factor):
    result = run_case(case(factor), 3, LIMITS, 1e-3)
    assert "WRONG" in result["wrong"] and result["contestants"] == {}
    assert "not timed" in render(result)


def test_a_wrong_gradient_is_not_timed():
    def ours(x, backend):
        return x * 1.0 + x.detach()

    assert "wrong" in run_case(case()._replace(ours=ours), 3, LIMITS, 1e-3)


def test_a_right_result_is_timed_beside_its_rivals():
    result = run_case(case(), 3, LIMITS, 1e-3)
    ours, rival = result["contestants"]["ours (torch)"], result["contestants"]["another"]
    assert ours["error"] == 0 and rival["forward_ms"] > 0
    assert ours["both_tflops"] == pytest.approx(6 / ours["both_ms"] * 1e3 / 1e12)
    assert ours["share_of_copy"] == pytest.approx(ours["forward_gbps"] * 1e9 / 1e9)
    assert "ours (torch)" in render(result) and "x ours" in render(result)


def test_error_is_relative_to_the_largest_entry():
    want = torch.tensor([0.0, 10.0], dtype=torch.float64)
    assert largest_error((torch.tensor([0.5, 10.0]),), (want,)) == pytest.approx(0.05)


def test_saved_bytes_are_those_of_the_graph_without_its_leaves():
    x = torch.ones(10, requires_grad=True)
    assert saved_bytes(Contestant(lambda x: x * 2, (x,))) == 0
    # exp keeps its output, and sin its input, which is the leaf.
    assert saved_bytes(Contestant(lambda x: x.exp(), (x,))) == 40
    assert saved_bytes(Contestant(lambda x: x.sin(), (x,))) == 0


def test_contestants_take_turns():
    calls: list[str] = []
    times = seconds_of({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "a", "b", "b"] + ["a", "b"] * 3
    assert [len(values) for values in times.values()] == [3, 3]


def test_a_copy_moves_bytes():
    assert copy_rate("cpu") > 1e8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_op"], "kernels/no_such_op.py has no benchmark_cases()"),
        (["rms_norm", "--repeats", "0"], "--repeats and --threads must be at least 1"),
        (["rms_norm", "--shapes", "D9999"], "--shapes D9999: no such case"),
    ],
)
def test_a_mistake_is_named(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["rms_norm", "--device", "cuda"]) == 2
    assert "--device cuda: PyTorch sees no GPU" in capsys.readouterr().err


def test_results_are_written_with_what_they_depend_on(tmp_path, capsys):
    path = tmp_path / "results" / "rms_norm.json"
    arguments = ["rms_norm", "--device", "cpu", "--shapes", "D192", "--repeats", "2"]
    assert main([*arguments, "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert {"chip", "torch", "triton", "commit", "matmul_tflops", "copy_gbps"} <= set(written)
    (result,) = written["cases"]
    assert "D192" in result["name"] and "F.rms_norm" in result["contestants"]
    assert result["name"] in capsys.readouterr().out


def test_a_leaf_takes_gradients():
    x = leaf(3, 2, std=0.5, dtype=torch.bfloat16, device="cpu")
    assert x.requires_grad and x.is_leaf and x.dtype == torch.bfloat16
