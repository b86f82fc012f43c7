"""Does the search for block sizes keep what is faster and right, and nothing else?

In the interpreter, where times mean nothing: the clock is replaced.
"""

import json

import pytest
import torch
from conftest import randn

pytest.importorskip("triton")

from kernels import tiles, tune
from kernels.bench import Case
from kernels.grouped_matmul import grouped_matmul
from kernels.tiles import Tile, choose_tile, on_trial


@pytest.fixture
def own_table(tmp_path, monkeypatch):
    """A copy of the table that may be written."""
    path = tmp_path / "tiles.json"
    path.write_text(tiles.TABLE.read_text())
    monkeypatch.setattr(tiles, "TABLE", path)
    tiles.load_tiles.cache_clear()
    yield path
    tiles.load_tiles.cache_clear()


def case(factor=1.0):
    x, weight = (randn(*shape, seed=1).requires_grad_() for shape in ((8, 16), (2, 16, 16)))
    offsets = torch.tensor([0, 5, 8])

    def reference(x, weight):
        return torch.cat([x[:5] @ weight[0].T, x[5:] @ weight[1].T]) * factor

    return Case(
        name="two experts",
        ours=lambda x, weight, backend: grouped_matmul(x, weight, offsets, backend=backend),
        leaves=(x, weight),
        reference=reference,
        rivals={},
        grad=randn(8, 16, seed=2),
        tokens=8,
    )


def clock(monkeypatch, fast):
    """Tiles for which `fast` is True take half the time of the others; there are few to try."""
    monkeypatch.setattr(tune, "CHOICES", {"num_warps": (4, 8), "num_stages": (2, 4)})

    def seconds_of(contestants, repeats, clock):
        def seconds(call):
            call()
            return 1.0 if fast(call.args[0]) else 2.0

        return {name: [seconds(call)] * repeats for name, call in contestants.items()}

    monkeypatch.setattr(tune, "seconds_of", seconds_of)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tensors are on the CPU")
def test_a_faster_tile_is_kept_and_saved(own_table, monkeypatch):
    clock(monkeypatch, lambda tile: tile.num_stages == 4)
    before = json.loads(own_table.read_text())
    said = []
    winners = tune.tune_case(case(), 1e-5, 1, said.append)
    assert {tile.num_stages for tile in winners.values()} == {4}
    assert "grouped_linear" in winners and any("saved" in line for line in said)
    assert choose_tile("grouped_linear", torch.device("cpu"), torch.float32, 4).num_stages == 4
    # Larger sizes keep what they had.
    after = json.loads(own_table.read_text())["grouped_linear"]
    arch = "interpreter"
    assert after[arch]["float32"]["any"] == before["grouped_linear"][arch]["float32"]["any"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tensors are on the CPU")
def test_changes_that_help_are_combined(own_table, monkeypatch):
    monkeypatch.setattr(tune, "CHOICES", {"num_warps": (4, 8), "num_stages": (2, 4)})
    # Two changes bring more than one, and either of them something.
    cost = {(4, 2): 4.0, (8, 2): 3.0, (4, 4): 3.5, (8, 4): 1.0}

    def seconds_of(contestants, repeats, clock):
        tiles_of = {name: call.args[0] for name, call in contestants.items()}
        return {name: [cost[t.num_warps, t.num_stages]] for name, t in tiles_of.items()}

    monkeypatch.setattr(tune, "seconds_of", seconds_of)
    winners = tune.tune_case(case(), 1e-5, 1, lambda line: None)
    assert {(tile.num_warps, tile.num_stages) for tile in winners.values()} == {(8, 4)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tensors are on the CPU")
def test_nothing_is_saved_where_the_table_is_best_or_the_result_is_wrong(own_table, monkeypatch):
    before = own_table.read_text()
    clock(monkeypatch, lambda tile: False)
    assert tune.tune_case(case(), 1e-5, 1, lambda line: None) == {}
    clock(monkeypatch, lambda tile: tile.num_stages == 4)
    assert tune.tune_case(case(factor=2.0), 1e-5, 1, lambda line: None) == {}
    assert own_table.read_text() == before


def test_a_tile_changes_one_number_at_a_time():
    tile = Tile({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=2)
    changed = list(tune.neighbours(tile))
    assert len(changed) == len(set(map(str, changed))) == 3 + 3 + 1 + 3
    for other in changed:
        flat = {**other.blocks, "w": other.num_warps, "s": other.num_stages}
        was = {**tile.blocks, "w": tile.num_warps, "s": tile.num_stages}
        assert sum(flat[key] != was[key] for key in was) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tensors are on the CPU")
def test_what_orders_the_sums_of_a_row_is_not_tuned(own_table, monkeypatch):
    clock(monkeypatch, lambda tile: tile.blocks["BLOCK_K"] == 32)
    monkeypatch.setattr(tune, "CHOICES", {"BLOCK_K": (32, 64)})
    winners = tune.tune_case(case(), 1e-5, 1, lambda line: None)
    # The gradients of matrices alone have no rows per expert.
    assert set(winners) == {"grouped_weight_grad"}
    monkeypatch.setattr(tune, "same_row_order", lambda *tiles: True)
    assert "grouped_linear" in tune.tune_case(case(), 1e-5, 1, lambda line: None)


def test_tiles_on_trial_end_with_the_block():
    usual = choose_tile("grouped_linear", torch.device("cpu"), torch.float32, 4)
    with on_trial() as trial:
        trial.instead["grouped_linear"] = usual._replace(num_stages=5)
        now = choose_tile("grouped_linear", torch.device("cpu"), torch.float32, 4)
        assert now.num_stages == 5 and trial.latest["grouped_linear"].tile == now
    assert choose_tile("grouped_linear", torch.device("cpu"), torch.float32, 4) == usual
