"""The benchmark tells wrong from right before it tells slow from fast."""

import pytest
import torch

from kernels.bench import Case, largest_error, leaf, main, run_case, seconds_of


def case(ours: float) -> Case:
    want = torch.tensor([2.0, -4.0], dtype=torch.float64)
    return Case(
        name="doubling",
        ours=lambda: (torch.tensor([2.0, ours]),),
        reference=lambda: (want,),
        rivals={"another": lambda: (want,)},
    )


def test_a_wrong_result_is_not_timed():
    lines = run_case(case(-4.1), 3, limit=1.0, tolerance=1e-3)
    assert len(lines) == 1 and "WRONG" in lines[0] and "not timed" in lines[0]
    assert "WRONG" in run_case(case(float("nan")), 3, limit=1.0, tolerance=1e-3)[0]


def test_a_right_result_is_timed_beside_its_rivals():
    lines = run_case(case(-4.0), 3, limit=1.0, tolerance=1e-3)
    assert lines[0].startswith("doubling: ") and "another: " in lines[1] and "x ours" in lines[1]


def test_error_is_relative_to_the_largest_entry():
    want = torch.tensor([0.0, 10.0], dtype=torch.float64)
    assert largest_error((torch.tensor([0.5, 10.0]),), (want,)) == pytest.approx(0.05)


def test_contestants_take_turns():
    calls: list[str] = []
    times = seconds_of({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == ["a", "a", "b", "b"] + ["a", "b"] * 3
    assert [len(values) for values in times.values()] == [3, 3]


def test_an_operation_without_cases_is_named(capsys):
    assert main(["no_such_op"]) == 2
    assert "kernels/no_such_op.py has no benchmark_cases()" in capsys.readouterr().err


def test_a_leaf_takes_gradients():
    x = leaf(3, 2, std=0.5, dtype=torch.bfloat16, device="cpu")
    assert x.requires_grad and x.is_leaf and x.dtype == torch.bfloat16
