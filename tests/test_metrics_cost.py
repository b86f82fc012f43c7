"""What do metrics cost a step: in waiting for the GPU, in messages, in time?"""

import re
import warnings

import pytest
import torch
from metrics_cases import LOGGED
from torch._subclasses.fake_tensor import FakeTensorMode
from training_cases import make_config, make_engine, micro_batches, write_config

from kernels.routing import fused_topk
from moe.routing import make_routing
from train import metrics_bench
from train.metrics import routing_sums
from train.step import train_step


def test_metrics_need_no_value_on_the_host():
    """A fake tensor has none: to read one back, which would wait for a GPU, raises."""
    with FakeTensorMode():
        logits, valid = torch.empty(20, 6), torch.empty(20, dtype=torch.bool)
        chosen = fused_topk(logits, 2)
        arguments = logits, chosen.router_probs, chosen.topk_weights, chosen.topk_indices, valid
        routings = (make_routing(*arguments), make_routing(*arguments))
        sums = routing_sums(routings, torch.device("cpu"), detail=True)
        both = sums.plus(routing_sums(routings, torch.device("cpu"), detail=True))
        assert both.tokens.shape == (6, 2) and both.logit_counts.shape == (2, 128)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_waits_for_the_gpu_as_often_with_more_layers(tmp_path):
    def waits(num_layers):
        changes = {"model.num_layers": num_layers, "training.device": "cuda"}
        config = make_config(tmp_path, changes)
        engine = make_engine(config)
        train_step(engine, micro_batches(config), 0, config, detail=True)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                train_step(engine, micro_batches(config, 1), 1, config, detail=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(each.message) for each in caught)

    assert waits(2) == waits(6)


def test_messages_of_a_step_do_not_grow_with_its_layers(tmp_path, monkeypatch):
    """What is summed over ranks: the same number of messages for 2 and for 4 routed layers."""

    def messages(num_layers, detail):
        config = make_config(tmp_path, {"model.num_layers": num_layers})
        engine, sent = make_engine(config), []
        monkeypatch.setattr(
            engine, "all_reduce", lambda x, maximum=False: sent.append(x.numel()) or x
        )
        train_step(engine, micro_batches(config), 0, config, detail=detail)
        return len(sent)

    assert messages(2, False) == messages(4, False)
    assert messages(2, True) == messages(4, True) == messages(2, False) + 1


def test_the_benchmark_of_metrics_adds_up(capsys, tmp_path):
    config = write_config(tmp_path / "run", LOGGED | {"logging.every": 10})
    assert metrics_bench.main(["--config", str(config), "--repeats", "2", "--threads", "1"]) == 0
    page = capsys.readouterr().out
    rows = [row.split("|")[2] for row in page.splitlines() if row.count("|") == 4]
    off, every_step, logged, pictured = map(float, rows[-4:])
    share = (every_step - off + (logged - every_step) / 10 + (pictured - logged) / 4) / off
    said = float(re.search(r"metrics cost (-?[\d.]+)% of a step", page)[1])
    assert said == pytest.approx(100 * share, abs=3)
    assert metrics_bench.main(["--config", str(config), "--repeats", "0"]) == 2
