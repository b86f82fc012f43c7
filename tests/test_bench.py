"""The benchmark tells wrong from right before it tells slow from fast."""

import importlib.machinery
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from kernels import bench, machine, report, swiglu_experts_benchmark
from kernels.bench import (
    Case,
    CaseBuilder,
    Contestant,
    largest_error,
    leaf,
    main,
    operations,
    render,
    run_case,
    saved_bytes,
)
from kernels.machine import (
    Limits,
    clock_of,
    copy_rate,
    gpu_seconds,
    host_seconds,
    seconds_of,
)
from kernels.swiglu_experts_benchmark import LIBRARIES, Shape, benchmark_cases, expert_by_expert

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
    # The largest may be negative, and of zeros there is none.
    assert largest_error((torch.tensor([0.5, -10.0]),), (-want,)) == pytest.approx(0.05)
    assert largest_error((torch.zeros(2),), (torch.zeros(2),)) == 0
    assert largest_error((torch.tensor([torch.nan, 10.0]),), (want,)) == float("inf")
    assert largest_error((want.unsqueeze(0),), (want,)) == float("inf")


@pytest.mark.parametrize("place", [0, 5, 9])
def test_large_tensors_are_compared_in_parts(monkeypatch, place):
    monkeypatch.setattr(bench, "ERROR_ELEMENTS", 3)
    want = torch.ones(5, 2)
    wrong = want.clone()
    wrong.view(-1)[place] = 1.5
    assert largest_error((wrong,), (want,)) == 0.5 and largest_error((want,), (want,)) == 0


def test_integers_are_right_or_wrong():
    want = torch.arange(5000)
    assert largest_error((want.clone(),), (want,)) == 0
    swapped = want.clone()
    swapped[[7, 8]] = want[[8, 7]]
    assert largest_error((swapped,), (want,)) == float("inf")


def test_a_case_without_memory_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def no_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    builders = [CaseBuilder("large", no_memory), CaseBuilder("small", case)]
    monkeypatch.setattr(bench, "cases_of", lambda op, dtype, device: builders)
    arguments = ["rms_norm", "--device", "cpu", "--repeats", "2", "--json", str(tmp_path)]
    assert main(arguments) == 1
    assert "large: out of memory; not timed" in capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    assert [each["name"] for each in json.loads(path.read_text())["cases"]] == ["large", "doubling"]


def test_flops_of_the_backward_pass_are_those_of_the_case():
    facts = run_case(case()._replace(backward_flops=5.0), 3, LIMITS, 1e-3)["contestants"]
    ours = facts["ours (torch)"]
    assert ours["both_tflops"] == pytest.approx(7 / ours["both_ms"] * 1e3 / 1e12)


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


def test_a_gpu_is_timed_by_its_own_clock():
    assert clock_of("cpu") is host_seconds and clock_of(torch.device("cuda", 0)) is gpu_seconds
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    x = torch.randn(4096, 4096, device="cuda")
    times = seconds_of({"matmul": lambda: x @ x}, 3, gpu_seconds)["matmul"]
    assert len(times) == 3 and min(times) > 0


def test_a_copy_moves_bytes():
    assert copy_rate("cpu") > 1e8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_op"], "OP (no_such_op) must be all, or one of attention, cross_entropy"),
        (["rms_norm", "--repeats", "0"], "--repeats (0) must be at least 1"),
        (["rms_norm", "--threads", "0"], "--threads (0) must be from 1 to"),
        (["rms_norm", "--threads", "99999"], "--threads (99999) must be from 1 to"),
        (["rms_norm", "--shapes", "D9999"], "--shapes (D9999) must be part of one of: rows4096"),
        (["rms_norm", "--json", "file/a.json"], "--json (file/a.json) cannot be written: "),
        (["rms_norm", "--json", "file/a"], "--json (file/a) cannot be written: "),
    ],
)
def test_a_mistake_is_named(arguments, message, capsys, run_in):
    (run_in / "file").write_text("")
    assert main([*arguments, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["rms_norm", "--device", "cuda"]) == 2
    assert "--device cuda: PyTorch sees no GPU" in capsys.readouterr().err


def test_results_are_written_with_what_they_depend_on(tmp_path, capsys):
    arguments = ["rms_norm", "--device", "cpu", "--shapes", "D192", "--repeats", "2"]
    assert main([*arguments, "--json", str(tmp_path / "results")]) == 0
    (path,) = (tmp_path / "results").iterdir()
    assert path.name.endswith("_rms_norm_float32.json")
    written = json.loads(path.read_text())
    assert {"chip", "torch", "triton", "commit", "matmul_tflops", "copy_gbps"} <= set(written)
    (result,) = written["cases"]
    assert "D192" in result["name"] and "F.rms_norm" in result["contestants"]
    assert result["name"] in capsys.readouterr().out
    # The same file again, by its name; a file cannot hold all operations.
    path.unlink()
    assert main([*arguments, "--json", str(path)]) == 0
    assert json.loads(path.read_text())["op"] == arguments[0]
    capsys.readouterr()
    assert main(["all", "--device", "cpu", "--json", str(path)]) == 2
    assert f"--json ({path}) must be a folder" in capsys.readouterr().err
    other = path.rename(path.with_suffix(".txt"))
    assert main([*arguments, "--json", str(other)]) == 2
    assert f"--json ({other}) must be a folder, or a file" in capsys.readouterr().err


def test_all_operations_can_be_run_at_once(capsys):
    assert main(["all", "--device", "cpu", "--shapes", "T4096 D256 E16", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert "combine T4096" in printed and all(op in printed for op in operations())


def test_a_rival_that_fails_or_is_wrong_is_not_timed():
    def broken(x):
        raise RuntimeError("no such chip\nat line 3")

    right = case()
    (leaf,) = right.leaves
    rivals = {
        "broken": Contestant(broken, (leaf,)),
        "wrong": Contestant(lambda x: x * 3, (leaf,)),
        "another operation": Contestant(lambda x: x * 3, (leaf,), same=False),
    }
    calls: list[str] = []

    def ours(x, backend):
        calls.append("ours")
        return right.ours(x, backend=backend)

    def make():
        # When ours has been checked.
        assert "ours" in calls
        return right.rivals["another"]

    large = {"not made": lambda: broken(leaf), "made": make}
    all_of_them = right._replace(ours=ours, rivals=rivals, large_rivals=large)
    result = run_case(all_of_them, 2, LIMITS, 1e-3)
    facts = result["contestants"]
    assert facts["not made"] == facts["broken"] and facts["made"]["both_ms"] > 0
    assert facts["broken"] == {"wrong": "fails here: RuntimeError: no such chip"}
    assert facts["wrong"] == {"wrong": "WRONG, error 5.0e-01"}
    assert facts["another operation"]["both_ms"] > 0
    assert "no such chip; not timed" in render(result)


@pytest.fixture
def other_libraries(monkeypatch):
    """ScatterMoE and Liger-Kernel as their interfaces are, made of plain PyTorch."""

    class ParallelExperts(torch.nn.Module):
        def __init__(self, num_experts, d_in, d_out):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(num_experts, d_out, d_in))

    class GLUMLP(torch.nn.Module):
        def __init__(self, d_in, d_inner, num_experts, top_k):
            super().__init__()
            self.experts = ParallelExperts(num_experts, d_in, 2 * d_inner)
            self.output_experts = ParallelExperts(num_experts, d_inner, d_in)

        def forward(self, x, expert_p, expert_idxs):
            up, gate = self.experts.weight.chunk(2, 1)
            down = self.output_experts.weight
            return expert_by_expert(expert_idxs, x, gate, down, up, expert_p)

    class LigerFusedMoEFunction:
        @staticmethod
        def apply(x, gate_up, down, indices, weights):
            assert indices.dtype == torch.int32
            gate, up = gate_up.chunk(2, 1)
            return expert_by_expert(indices, x, gate, down, up, weights)

    for name, content in (
        ("scattermoe", {}),
        ("scattermoe.mlp", {"GLUMLP": GLUMLP}),
        ("liger_kernel", {}),
        ("liger_kernel.ops", {"LigerFusedMoEFunction": LigerFusedMoEFunction}),
    ):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    everywhere = [library._replace(runs_on_cpu=True) for library in LIBRARIES]
    monkeypatch.setattr(swiglu_experts_benchmark, "LIBRARIES", everywhere)


def test_expert_layers_of_other_libraries_take_part_where_installed(other_libraries, monkeypatch):
    shapes = {"tiny": (Shape(64, 16, 32, 4, 2),)}
    monkeypatch.setattr(swiglu_experts_benchmark, "CPU_SHAPES", shapes)
    # What is compiled would take seconds.
    for module in (bench, swiglu_experts_benchmark):
        monkeypatch.setattr(module, "has_compiler", lambda: False)
    for build in benchmark_cases(torch.float32, "cpu"):
        facts = run_case(build.case(), 1, LIMITS, 1e-5)["contestants"]
        assert facts["ScatterMoE"]["both_ms"] > 0 and facts["Liger-Kernel"]["both_ms"] > 0


@pytest.mark.parametrize("found", [True, False])
def test_compiled_expert_layers_take_part_where_there_is_a_compiler(monkeypatch, found):
    shapes = {"tiny": (Shape(64, 16, 32, 4, 2),)}
    monkeypatch.setattr(swiglu_experts_benchmark, "CPU_SHAPES", shapes)
    for module in (bench, swiglu_experts_benchmark):
        monkeypatch.setattr(module, "has_compiler", lambda: found)
    case = benchmark_cases(torch.float32, "cpu")[0].case()
    assert ("torch_compile" in bench.backends_for(case)) == found
    assert ("dense layer, torch.compile" in case.rivals) == found


def result(**facts):
    """As `kernels.bench` writes it, of one case."""
    ours = {"both_ms": 2.0, "both_tflops": 0.5, "share_of_matmul": 0.25}
    contestants = {"ours (torch)": ours, "slow": {"both_ms": 8.0}, "lame": {"wrong": "fails here"}}
    wrong = {"name": "T2", "contestants": {}, "wrong": "WRONG"}
    cases = [{"name": "T1", "contestants": contestants}, wrong]
    of = {"op": "op", "dtype": "float32", "device": "cpu", "chip": "Chip", "threads": 2}
    of |= {"repeats": 3, "torch": "2", "triton": "3", "commit": "abc"}
    return of | {"matmul_tflops": 2.0, "copy_gbps": 9.0, "cases": cases} | facts


def test_tables_are_made_of_results(tmp_path, capsys):
    path, readme = tmp_path / "result.json", tmp_path / "README.md"
    path.write_text(json.dumps(result()))
    (tmp_path / "aot.json").write_text("{}")
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert report.main([str(path), "--write", str(readme)]) == 0
    assert report.main([str(path), str(tmp_path / "aot.json")]) == 0
    table = capsys.readouterr().out.strip()
    assert readme.read_text() == f"before\n{report.BEGIN}\n{table}\n{report.END}\nafter\n"
    assert table.splitlines()[2:] == [
        "| shape | ours (torch) | TFLOP/s (of matmul) | slow | lame |",
        "| --- | --- | --- | --- | --- |",
        "| T1 | 2 ms | 0.5 (25%) | 8 ms (0.25) | fails here |",
        "| T2 | WRONG |  |  |  |",
    ]
    readme.write_text("no marks")
    assert report.main([str(path), "--write", str(readme)]) == 2
    assert "there must be the two lines" in capsys.readouterr().err


def test_tables_in_the_readme_are_those_of_the_committed_results():
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert report.between_marks(text, report.tables()) == text


def test_a_leaf_takes_gradients():
    x = leaf(3, 2, std=0.5, dtype=torch.bfloat16, device="cpu")
    assert x.requires_grad and x.is_leaf and x.dtype == torch.bfloat16


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_written_results_leave_the_checkout_clean_and_changed_code_does_not(tmp_path):
    def git(*command):
        subprocess.run(["git", "-C", tmp_path, *command], check=True, capture_output=True)

    result, code = tmp_path / "kernels/results/a.json", tmp_path / "kernels/a.py"
    result.parent.mkdir(parents=True)
    readme = tmp_path / "README.md"
    for file in (result, code, readme):
        file.write_text("1")
    git("init")
    git("add", ".")
    assert machine.commit_of(tmp_path) is None
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "first")
    result.write_text("2")
    readme.write_text("2")
    (tmp_path / "new.txt").write_text("1")
    clean = machine.commit_of(tmp_path)
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    code.write_text("2")
    assert machine.commit_of(tmp_path) == f"{clean}-dirty"


def test_cases_are_built_without_libraries_that_measure_nothing():
    """Of the expert layer only the list: its rivals are other libraries, where installed."""
    code = """
import sys, torch
from kernels.bench import cases_of, operations

for op in operations():
    for dtype in (torch.float32, torch.bfloat16):
        builders = cases_of(op, dtype, "cpu")
        assert builders, op
    if op != "swiglu_experts":
        builders[0].case()
    found = {"deepspeed", "datasets", "transformers"} & set(sys.modules)
    assert not found, (op, found)
print(*operations())
"""
    root = Path(bench.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.split() == operations(), done.stderr
