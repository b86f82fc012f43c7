"""What an engine restores, it restores whole, or not at all."""

import pytest
import torch
from training_cases import make_config, make_engine, micro_batches

from train.errors import CheckpointError
from train.expert_names import join_experts, split_experts
from train.step import train_step


def trained(tmp_path):
    config = make_config(tmp_path / "run")
    engine = make_engine(config)
    train_step(engine, micro_batches(config), 0, config)
    return config, engine


def test_experts_stand_alone_under_their_numbers_and_come_back():
    stack = torch.arange(12.0).view(3, 2, 2)
    parts = split_experts("blocks.1.feed_forward.experts.w2", stack)
    assert list(parts) == [f"blocks.1.feed_forward.experts.{e}.w2" for e in range(3)]
    assert torch.equal(join_experts(parts)["blocks.1.feed_forward.experts.w2"], stack)
    assert list(split_experts("head.weight", stack)) == ["head.weight"]


@pytest.mark.parametrize("lost", ["experts.1.w3", "experts.3.w1"])
def test_a_lost_expert_is_missed(tmp_path, lost):
    config, engine = trained(tmp_path)
    groups = engine.state_tensors()
    for group in groups.values():
        for name in [name for name in group if lost in name]:
            del group[name]
    with pytest.raises(CheckpointError):
        make_engine(config).load_state_tensors(groups)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.0.attention.wq.weight:exp_avg", r"exp_avg: blocks.0.attention.wq.weight is miss"),
        ("head.weight:step", r"step: head.weight is missing"),
        ("blocks.1.feed_forward.experts.2.w1:exp_avg_sq", r"some are missing"),
    ],
)
def test_a_lost_moment_is_refused(tmp_path, name, message):
    config, engine = trained(tmp_path)
    groups = engine.state_tensors()
    del groups["optimizer"][name]
    with pytest.raises(CheckpointError, match=message):
        make_engine(config).load_state_tensors(groups)


def test_a_short_or_unknown_moment_is_refused(tmp_path):
    config, engine = trained(tmp_path)
    groups = engine.state_tensors()
    name = "head.weight:exp_avg"
    whole = groups["optimizer"][name]
    groups["optimizer"][name] = whole[:-1]
    with pytest.raises(CheckpointError, match=r"exp_avg: head.weight is .* needs"):
        make_engine(config).load_state_tensors(groups)
    groups["optimizer"][name] = whole
    groups["optimizer"]["other.weight:exp_avg"] = whole
    with pytest.raises(CheckpointError, match=r"other.weight is unknown to this model"):
        make_engine(config).load_state_tensors(groups)


def test_a_share_of_the_experts_is_counted_as_the_whole_model():
    from model_cases import tiny_config

    from moe.layer import MoELayer
    from moe.model import MoETransformer, num_parameters
    from moe.variants import load_variant

    class Half(MoELayer):
        first_expert = 2

        def build_experts(self, config):
            self.num_local_experts = config.moe.num_experts // 2
            module = load_variant("experts", "swiglu")
            size = config.hidden_size, config.moe.intermediate_size
            return module.Experts(config.moe.experts, self.num_local_experts, *size)

    config = tiny_config(moe={"num_experts": 4})
    whole = num_parameters(MoETransformer(config))
    assert num_parameters(MoETransformer(config, moe_layer=Half)) == whole
