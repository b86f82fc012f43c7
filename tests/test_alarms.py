"""Does each planted fault raise its own alarm, once, where it is, and no other?"""

import math
import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_cases import Recorder, at, checkpoint, make_config, run

import train.step
from moe.config import ModelConfig
from moe.routers.topk import Router
from train.alarms import SLOW_STEPS, SPIKE_LEAST, Alarms
from train.metrics import WINDOW_STEPS, LoadWindow, StepMetrics

EXPERTS, TOP_K, LAYERS = 8, 2, (1, 3)
MODEL = make_config(
    Path("unused"),
    {
        "model.moe.num_experts": EXPERTS,
        "model.num_layers": 4,
        "model.moe.moe_layer_every": 2,
    },
).model
EVEN = torch.full((2, EXPERTS), 10)


def metrics(step, *, load=EVEN, loss=4.0, dropped=(0, 0), work=(0.1,), skipped=False):
    return StepMetrics(
        step=step,
        lm_loss=loss,
        aux_losses={},
        aux_coefficients={},
        learning_rate=0.1,
        gradient_norm=1.0,
        tokens_per_expert=load,
        num_dropped=torch.tensor(dropped),
        work_seconds=torch.tensor(work, dtype=torch.float64),
        num_tokens=80,
        skipped=skipped,
    )


class Watched:
    """Alarms over steps that are given one after another."""

    def __init__(self):
        self.alarms, self.window, self.step = Alarms(MODEL), LoadWindow(), 0

    def see(self, steps, **facts):
        """The alarms of so many equal steps, as (kind, step)."""
        found = []
        for _ in range(steps):
            self.step += 1
            now = metrics(self.step, **facts)
            self.window.add(now.tokens_per_expert)
            found += self.alarms.check(now, self.window)
        return found


def only(alarms, kind):
    """The one alarm there is, of a kind."""
    assert [alarm.kind for alarm in alarms] == [kind], [alarm.text for alarm in alarms]
    return alarms[0]


def loads(*hot, layer=1, count=40):
    """Even but for a layer in which the experts `hot` have it all."""
    load = EVEN.clone()
    load[layer] = 0
    load[layer, list(hot)] = count
    return load


def test_an_even_load_and_a_falling_loss_raise_nothing():
    assert MODEL.moe_layers == LAYERS
    watched = Watched()
    for step in range(300):
        noise = 0.05 * math.sin(7.0 * step)
        assert watched.see(1, loss=8 - 4 * step / 300 + noise, work=(0.1, 0.11, 0.09)) == []


def test_a_collapse_names_layer_and_experts_and_raises_no_dead_ones():
    watched = Watched()
    watched.see(30)
    alarm = only(watched.see(150, load=loads(2, 5)), "collapse")
    assert 30 < alarm.step <= 50
    assert "layer 3 uses" in alarm.text and "experts 2, 5" in alarm.text.replace("5, 2", "2, 5")
    assert f"step {alarm.step}" in alarm.text
    # Gone and back: raised again.
    watched.see(30)
    assert only(watched.see(40, load=loads(6, 7)), "collapse").step > alarm.step


def test_a_collapse_of_a_router_without_a_bound_is_one_of_its_mean():
    """ReLU routing may give a token all experts: two for all tokens are a collapse, if two are
    meant."""
    moe = MODEL.moe.model_dump() | {"router": {"name": "relu", "target": 2.0}}
    watched = Watched()
    watched.alarms = Alarms(ModelConfig.model_validate(MODEL.model_dump() | {"moe": moe}))
    watched.see(30)
    assert "experts 2, 5" in only(watched.see(50, load=loads(2, 5)), "collapse").text.replace(
        "5, 2", "2, 5"
    )


def test_experts_that_stay_dead_after_a_collapse_are_named():
    watched = Watched()
    watched.see(20)
    only(watched.see(60, load=loads(2, 5)), "collapse")
    half = EVEN.clone()
    half[1, 4:] = 0
    first, second = watched.see(200, load=half)
    # 5 was one of the two that had it all.
    assert "dead expert: layer 3, experts 4, 6, 7: no token" in first.text
    assert "dead expert: layer 3, expert 5: no token" in second.text


def test_a_dead_expert_is_named_once_until_it_lives_again():
    load = EVEN.clone()
    load[0, 4] = 0
    watched = Watched()
    alarm = only(watched.see(250, load=load), "dead expert")
    assert alarm.step == WINDOW_STEPS
    line = "alarm, step 100: dead expert: layer 1, expert 4: no token in the last 100 steps"
    assert alarm.text == line
    watched.see(1)
    again = only(watched.see(150, load=load), "dead expert")
    assert again.step == 251 + WINDOW_STEPS


def test_too_few_tokens_to_tell_are_no_dead_expert():
    load = torch.zeros(2, EXPERTS, dtype=torch.int64)
    load[:, 0] = 1
    assert "dead expert" not in [alarm.kind for alarm in Watched().see(200, load=load)]


def test_many_dead_experts_are_one_line():
    wide = Alarms(
        MODEL.model_copy(update={"moe": MODEL.moe.model_copy(update={"num_experts": 40})})
    )
    window, found = LoadWindow(), []
    load = torch.full((2, 40), 30)
    load[1, 20:] = 0
    for step in range(1, 120):
        window.add(load)
        found += wide.check(metrics(step, load=load), window)
    assert only(found, "dead expert").text.endswith(
        "layer 3, experts 20, 21, 22, 23, 24, 25, 26, 27 and 12 more: "
        "no token in the last 100 steps"
    )


def test_a_drop_spike_is_against_the_steps_before():
    watched = Watched()
    # A tenth has been dropped all along: no spike.
    assert watched.see(60, dropped=(0, 9)) == []
    alarm = only(watched.see(10, dropped=(0, 40)), "drop spike")
    assert alarm.step == 61
    assert "layer 3 dropped 50.0% of its assignments" in alarm.text and "11.2%" in alarm.text
    assert watched.see(10, dropped=(0, 9)) == []
    assert only(watched.see(3, dropped=(30, 9)), "drop spike").text.count("layer 1") == 1


def test_a_loss_spike_needs_steps_before_it():
    watched = Watched()
    watched.see(SPIKE_LEAST - 1, loss=4.0)
    assert watched.see(1, loss=9.0) == []
    watched = Watched()
    watched.see(SPIKE_LEAST, loss=4.0)
    alarm = only(watched.see(3, loss=4.5), "loss spike")
    assert alarm.step == SPIKE_LEAST + 1 and "loss 4.500" in alarm.text and "4.000" in alarm.text
    # 4 % above is none.
    assert watched.see(20, loss=4.15) == []


def test_noise_of_the_loss_is_no_spike():
    watched, generator = Watched(), torch.Generator().manual_seed(0)
    for _ in range(500):
        loss = float(4 + 0.3 * torch.randn((), generator=generator).clamp(-3, 3))
        assert watched.see(1, loss=loss) == []
    assert only(watched.see(1, loss=8.0), "loss spike")


def test_a_batch_of_a_rare_domain_is_no_spike_each_time():
    watched, found = Watched(), []
    for step in range(240):
        rare = step % 17 == 9
        found += watched.see(1, loss=6.0 if rare else 3.0 + 0.02 * (step % 3))
    assert len(found) <= 1
    # Near a loss of zero a fraction of a nat is none.
    near = Watched()
    assert all(near.see(1, loss=0.001 + 0.06 * (step % 30 == 29)) == [] for step in range(100))


def test_a_run_that_diverges_from_the_start_is_named_once():
    watched = Watched()
    watched.see(1, loss=5.8)
    alarm = only(watched.see(15, loss=266.0), "divergence")
    assert alarm.step == 6 and "above the first step's 5.800" in alarm.text
    # A spike of four steps is no divergence.
    short = Watched()
    short.see(1, loss=5.8)
    assert short.see(4, loss=9.0) == [] and short.see(10, loss=5.0) == []


def test_a_slow_rank_is_named_when_it_lasts():
    watched = Watched()
    assert watched.see(SLOW_STEPS - 1, work=(0.1, 0.1, 0.2, 0.1)) == []
    # One quick step begins the count again.
    assert watched.see(1, work=(0.1, 0.1, 0.1, 0.1)) == []
    alarm = only(watched.see(40, work=(0.1, 0.1, 0.2, 0.1)), "slow rank")
    assert alarm.step == 2 * SLOW_STEPS
    assert "rank 2 needs 200 ms" in alarm.text and "others 100 ms" in alarm.text


@pytest.mark.parametrize("work", [(0.0, 0.3), (0.1, 0.14), (0.001, 0.004), (0.5,)])
def test_no_measurement_and_small_differences_are_no_slow_rank(work):
    assert Watched().see(50, work=work) == []


def test_a_skipped_step_is_not_looked_at():
    watched = Watched()
    watched.see(40)
    assert watched.see(1, loss=math.nan, skipped=True) == []
    assert watched.see(1, loss=4.0) == []


def test_a_run_that_goes_on_raises_what_it_would_have_raised():
    def facts(step):
        load = EVEN.clone()
        load[0, 4] = 0
        if step > 125:
            load = loads(2, 5)
        return {
            "load": load,
            "loss": 9.0 if step == 160 else 4.0,
            "dropped": (0, 40) if 140 < step < 150 else (0, 0),
        }

    def alarms_of(stops, remembered=True):
        watched, found = Watched(), []
        for step in range(1, 200):
            if step in stops:
                state, window = watched.alarms.state(), watched.window.tensor()
                watched.alarms, watched.window = Alarms(MODEL), LoadWindow()
                if remembered:
                    watched.alarms.restore(state)
                watched.window.restore(window)
            found += watched.see(1, **facts(step))
        return found

    expected = alarms_of(())
    kinds = ["dead expert", "drop spike", "collapse", "loss spike"]
    assert [alarm.kind for alarm in expected] == kinds
    assert alarms_of((50, 110, 145, 161)) == expected
    # The control: without the state they are raised again.
    assert len(alarms_of((145, 161), remembered=False)) > len(expected)


# ---- in runs


QUIET = {
    "model.moe.router": {"name": "topk", "top_k": 2},
    "training.steps": 130,
    "training.micro_batch_size": 4,
    "evaluation.every": 0,
    "optimizer.learning_rate": 0.002,
    "schedule.name": "constant",
    "logging.tensorboard": True,
    "logging.every": 50,
}


def take(choose):
    """A router that takes choose(routing, step) in place of what it chose, in training."""
    free = Router.forward

    def forward(router, x, context):
        routing = free(router, x, context)
        chosen = choose(routing, forward.step, context.layer)
        if not context.training or chosen is None:
            return routing
        if isinstance(chosen, tuple):
            return chosen[0]
        return free(router, x, context._replace(topk_indices=chosen))

    return forward


def planted(run_dir, monkeypatch, choose=None, before_step=lambda step: None, **changes):
    """Lines of the alarms of a run, and what stands in TensorBoard."""
    forward = take(choose or (lambda routing, step, layer: None))

    def each(step):
        forward.step = step
        before_step(step)

    monkeypatch.setattr(Router, "forward", forward)
    with Recorder(before_step=each):
        assert run(run_dir, QUIET | changes) == 0
    kinds = dict.fromkeys(("scalars", "tensors"), 0)
    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance=kinds).Reload()


def alarm_lines(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("alarm")]


def test_a_healthy_run_raises_nothing(tmp_path, monkeypatch, capsys):
    events = planted(tmp_path / "run", monkeypatch)
    assert alarm_lines(capsys) == []
    assert "alarms/text_summary" not in events.Tags()["tensors"]
    assert {scalar.value for scalar in events.Scalars("health/alarms")} == {0}


def collapse(routing, step, layer):
    if step < 40 or layer != 1:
        return None
    return torch.tensor([3, 0]).expand_as(routing.topk_indices)


def kill(routing, step, layer):
    """Expert 2 of layer 0 is passed over."""
    if layer != 0:
        return None
    chosen = routing.topk_indices
    spare = torch.tensor([min({0, 1, 3} - set(row)) for row in chosen.tolist()])
    return torch.where(chosen == 2, spare.unsqueeze(-1), chosen)


def drop(routing, step, layer):
    """From step 60 on, layer 1 drops the second choices."""
    if step < 60 or layer != 1:
        return None
    kept = routing.topk_indices.clone()
    kept[:, 1] = -1
    weights = routing.topk_weights * (kept >= 0)
    counts, dropped = (
        torch.bincount(column, minlength=routing.router_probs.shape[-1])
        for column in routing.topk_indices.T
    )
    return (
        routing._replace(
            topk_indices=kept,
            topk_weights=weights,
            tokens_per_expert=counts,
            num_dropped=dropped,
        ),
    )


@pytest.mark.parametrize(
    ("choose", "line"),
    [
        (collapse, r"alarm, step (\d+): collapse: layer 1 uses .* experts? [03], [03] "),
        (kill, r"alarm, step (100): dead expert: layer 0, expert 2: no token in the last 100"),
        (drop, r"alarm, step (61): drop spike: layer 1 dropped 50.0% .* expert \d is the fullest"),
    ],
)
def test_a_planted_fault_of_a_router_raises_its_alarm(choose, line, tmp_path, monkeypatch, capsys):
    events = planted(tmp_path / "run", monkeypatch, choose)
    lines = alarm_lines(capsys)
    assert len(lines) == 1
    found = re.match(line, lines[0])
    assert found is not None, lines
    step = int(found[1])
    (mark,) = events.Tensors("alarms/text_summary")
    assert mark.step == step
    assert mark.tensor_proto.string_val[0].decode().split() == lines[0].split()
    assert [s.step for s in events.Scalars("health/alarms") if s.value == 1] == [step]


def test_a_planted_loss_spike_raises_its_alarm(tmp_path, monkeypatch, capsys):
    engines = []
    real = train.step.find_nonfinite

    def see(engine, *arguments):
        engines.append(engine)
        return real(engine, *arguments)

    def spike(step):
        if step in (80, 81):
            with torch.no_grad():
                engines[-1].model.head.weight.mul_(-30 if step == 80 else -1 / 30)

    monkeypatch.setattr(train.step, "find_nonfinite", see)
    events = planted(tmp_path / "run", monkeypatch, before_step=spike)
    lines = alarm_lines(capsys)
    assert len(lines) == 1
    assert lines[0].startswith("alarm, step 81: loss spike: loss ")
    assert [mark.step for mark in events.Tensors("alarms/text_summary")] == [81]


def test_a_resumed_run_raises_no_alarm_twice(tmp_path, monkeypatch, capsys):
    forward = take(kill)
    monkeypatch.setattr(Router, "forward", forward)

    def each(step):
        forward.step = step
        at(115)(step)

    with Recorder(before_step=each):
        assert run(tmp_path / "run", QUIET) == 143
    assert len(alarm_lines(capsys)) == 1
    assert checkpoint(tmp_path / "run").step == 116
    with Recorder(before_step=lambda step: setattr(forward, "step", step)):
        assert run(tmp_path / "run", QUIET) == 0
    assert alarm_lines(capsys) == []
