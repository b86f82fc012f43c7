"""How far do choices agree: of two recordings, of eager PyTorch, Triton and Hugging Face?"""

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from model_cases import tiny_model, tokens
from training_cases import NUM_STEPS, run, work_dir

import train.routes
from moe.model import MoETransformer
from train.route_files import Header, Recording
from train.routes import main, routing_agreement, step_agreement

os.environ["HF_HUB_OFFLINE"] = "1"

# Without noise in the router, and routers with opinions.
DECIDED = {
    "model.moe.router": {"name": "topk"},
    "model.init_std": 0.3,
    "evaluation.every": 0,
    "training.steps": 1,
    "schedule.warmup_steps": 0,
}


def routes_of(output, batch_size: int) -> torch.Tensor:
    """(L, B, S, K) of a forward pass."""
    indices = torch.stack([routing.topk_indices for routing in output.routings])  # (L, T, K)
    return indices.view(len(indices), batch_size, -1, indices.shape[-1])


# ---- two recordings


@cache
def two_runs() -> tuple[Path, Path]:
    """Recordings of two runs that drift apart."""
    folders = []
    for rate in (0.02, 0.1):
        run_dir = work_dir() / f"rate_{rate}"
        changes = {"optimizer.learning_rate": rate, "routes.record": str(run_dir / "routes")}
        assert run(run_dir, changes | {"evaluation.every": 0}) == 0
        folders.append(run_dir / "routes")
    return folders[0], folders[1]


def by_hand(a: Path, b: Path) -> np.ndarray:
    """Agreement of each step and layer, by sets; (steps, L)."""
    routes = [np.fromfile(path / "routes.bin", "int8").reshape(-1, 4, 2, 16, 2) for path in (a, b)]
    found = np.zeros((len(routes[0]), 2))
    for step, layer in np.ndindex(found.shape):
        ours, theirs = (each[step, :, layer].reshape(-1, 2).tolist() for each in routes)
        same = sum(len({*x} & {*y}) for x, y in zip(ours, theirs, strict=True))
        found[step, layer] = same / (2 * len(theirs))
    return found


def test_agreement_is_the_share_of_common_choices():
    reference = torch.tensor([[[[0, 1], [2, 3]], [[4, 5], [0, -1]]]])
    routes = torch.tensor([[[[1, 0], [2, 5]], [[4, 5], [1, -1]]]])
    assert routing_agreement(routes, reference).tolist() == [5 / 7]
    assert routing_agreement(reference, reference).tolist() == [1]
    # Of 3 and 7 assignments 3 are the same, whichever comes first.
    fewer = torch.tensor([[[[0], [3]], [[4], [-1]]]])
    for pair in ((fewer, reference), (reference, fewer)):
        assert routing_agreement(*pair).tolist() == [3 / 5]


def test_the_program_prints_agreement_by_layer(capsys):
    a, b = two_runs()
    capsys.readouterr()
    assert main([str(a), str(b)]) == 0
    first, _, head, *rows = capsys.readouterr().out.splitlines()
    assert first == f"agreement over {NUM_STEPS} steps, 1 to {NUM_STEPS}"
    assert head.split() == ["layer", "mean", "worst", "at", "step"]
    expected = by_hand(a, b)
    assert expected[0].tolist() == [1, 1] and expected.min() < 0.9
    for layer, row in enumerate(rows):
        of_layer = expected[:, layer]
        wanted = layer, of_layer.mean(), of_layer.min(), of_layer.argmin() + 1
        assert [float(cell) for cell in row.split()] == pytest.approx(wanted, abs=5e-5)
    assert len(rows) == 2


def test_a_step_is_compared_in_parts_that_fit_into_memory(monkeypatch):
    a, b = (train.routes.open_recording(folder, "A") for folder in two_runs())
    expected = by_hand(*two_runs())
    sizes = []
    real = train.routes._common

    def common(routes, reference):
        sizes.append(routes.shape[1])
        return real(routes, reference)

    monkeypatch.setattr(train.routes, "_common", common)
    # Three sequences of 2 layers, 16 tokens and 2 x 2 comparisons.
    monkeypatch.setattr(train.routes, "_COMPARED", 3 * 2 * 16 * 4 + 1)
    for step in range(NUM_STEPS):
        assert step_agreement(a, b, step).tolist() == pytest.approx(expected[step], abs=1e-12)
    assert sizes == [3, 1] * NUM_STEPS


def shortened(folder: Path, tmp_path: Path, steps: slice) -> Path:
    """A copy with some of the steps."""
    header = Header.model_validate_json((folder / "routes.json").read_text())
    there, copy = Recording(folder, header), Recording(tmp_path / f"{steps.start}", header)
    copy.begin(0)
    for step in range(NUM_STEPS)[steps]:
        copy.write(step, 0, there.read(step, 0, 4))
    return copy.folder


def test_only_common_steps_count(tmp_path, capsys):
    a, b = two_runs()
    early, late = (shortened(a, tmp_path, part) for part in (slice(0, 5), slice(3, 8)))
    last = shortened(b, tmp_path, slice(5, 8))
    capsys.readouterr()
    assert main([str(early), str(late)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("agreement over 2 steps, 4 to 5\n") and printed.count("1.0000") == 4
    assert main([str(early), str(last)]) == 2
    assert f"{early} and {last} have no step in common" in capsys.readouterr().err


def test_recordings_of_other_tokens_are_not_compared(tmp_path, capsys):
    a, _ = two_runs()
    header = Header.model_validate_json((a / "routes.json").read_text())
    other = header.model_copy(update={"routes": header.routes | {"seed": 7}})
    Recording(tmp_path / "other", other).begin(0)
    capsys.readouterr()
    assert main([str(a), str(tmp_path / "other")]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {a} and {tmp_path / 'other'} are not of the same tokens:\n")
    assert f"\nseed: 0 in {a}, 7 in {tmp_path / 'other'}\n" in told
    assert main([str(a), str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith(f"error: B ({tmp_path / 'nothing'}) holds no reco")


def test_a_damaged_recording_is_one_line(tmp_path, capsys):
    a, b = two_runs()
    copy = shortened(b, tmp_path, slice(0, 8))
    with (copy / "routes.bin").open("r+b") as file:
        file.truncate(1000)
    capsys.readouterr()
    assert main([str(a), str(copy)]) == 3
    assert "routes.bin: the routes of step 4 are damaged or missing" in capsys.readouterr().err


# ---- eager PyTorch, Triton, Hugging Face


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_triton_chooses_what_pytorch_chooses_in_float32(device):
    pytest.importorskip("triton")
    from test_model_triton import batch, model_on

    with torch.no_grad():
        expected = routes_of(model_on("torch", device).eval()(*batch(device)), 2)
        model = model_on("triton", device).eval()
        assert routing_agreement(routes_of(model(*batch(device)), 2), expected).tolist() == [1, 1]
        # Other routes are taken as they are.
        shifted = (expected + 1) % 5
        bound = routes_of(model(*batch(device), routes=list(shifted)), 2)
    assert torch.equal(bound, shifted)
    assert routing_agreement(bound, expected).max() < 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
def test_runs_on_triton_and_pytorch_record_and_replay_the_same(tmp_path, capsys):
    """A whole step of each, and the replay of one on the other."""
    pytest.importorskip("triton")
    for backend in ("torch", "triton"):
        changes = DECIDED | {"model.kernel_backend": backend}
        assert (
            run(tmp_path / backend, changes | {"routes.record": str(tmp_path / f"{backend}_r")})
            == 0
        )
    ours, theirs = tmp_path / "triton_r", tmp_path / "torch_r"
    assert len(np.unique(np.fromfile(ours / "routes.bin", "int8"))) == 4
    capsys.readouterr()
    assert main([str(ours), str(theirs)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    assert rows == [["0", "1.0000", "1.0000", "1"], ["1", "1.0000", "1.0000", "1"]]
    changes = DECIDED | {"model.kernel_backend": "triton", "model.hidden_size": 24}
    changes |= {"routes.replay": str(theirs), "routes.record": str(tmp_path / "again")}
    assert run(tmp_path / "run", changes) == 0
    assert (tmp_path / "again/routes.bin").read_bytes() == (theirs / "routes.bin").read_bytes()


def test_bfloat16_chooses_nearly_the_same_and_replays_exactly():
    model, ids = tiny_model(num_layers=4), tokens(4, 64)
    expected = routes_of(model(ids), 4)
    with torch.autocast("cpu", torch.bfloat16):
        free = routing_agreement(routes_of(model(ids), 4), expected)
        bound = routing_agreement(routes_of(model(ids, routes=list(expected)), 4), expected)
    assert bound.tolist() == [1, 1, 1, 1]
    assert all(0.9 < share <= 1 for share in free.tolist()) and free.min() < 1


def test_a_model_in_hugging_faces_hands_chooses_what_ours_chooses():
    """In float32 exactly; theirs has its router in bfloat16 too, so that it differs there."""
    from test_interop_olmoe import our_model, their_model

    theirs, ids = their_model(0, num_hidden_layers=4), tokens(4, 64)
    ours = our_model(theirs)

    def their_routes(model) -> torch.Tensor:
        logits = model(ids, output_router_logits=True).router_logits
        return torch.stack([each.topk(3).indices.view(4, 64, 3) for each in logits])

    with torch.no_grad():
        expected = routes_of(ours(ids), 4)
        assert torch.equal(their_routes(theirs), expected)
        half = their_routes(theirs.bfloat16())
        free = routing_agreement(half, expected)
        assert all(0.9 < share <= 1 for share in free.tolist()) and free.min() < 1
        # What an exported model chose can be handed to ours.
        bound = routes_of(ours(ids, routes=list(half)), 4)
        assert routing_agreement(bound, half).tolist() == [1, 1, 1, 1]


def test_our_exported_model_chooses_the_same_in_transformers():
    from test_interop_olmoe import SHAPE, OlmoeConfig, OlmoeForCausalLM

    from moe.interop.olmoe import config_from_hf, state_dict_to_hf
    from moe.model import init_weights

    config = config_from_hf(OlmoeConfig(**SHAPE))
    ours = MoETransformer(config.model_copy(update={"init_std": 0.3}))
    init_weights(ours, 5)
    theirs = OlmoeForCausalLM(OlmoeConfig(**SHAPE)).eval()
    theirs.load_state_dict(state_dict_to_hf(ours.state_dict(), config))
    ids = tokens(2, 50)
    with torch.no_grad():
        logits = theirs(ids, output_router_logits=True).router_logits
        chosen = torch.stack([each.topk(3).indices.view(2, 50, 3) for each in logits])
        assert torch.equal(chosen, routes_of(ours(ids), 2))


def test_the_header_says_what_a_reader_needs():
    header = json.loads((two_runs()[0] / "routes.json").read_text())
    assert header["shape"] == [4, 2, 16, 2] and header["dtype"] == "int8"
    assert header["routes"]["model"] == {"layers": [0, 1], "num_experts": 4, "top_k": 2}
