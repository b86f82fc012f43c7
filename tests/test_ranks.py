"""What does a launcher tell us, and which settings does it refuse?"""

from pathlib import Path

import pytest
from training_cases import make_config

from train.deepspeed_config import derive_config
from train.errors import ConfigError
from train.ranks import Ranks, check_layout, launched_ranks

LAUNCHED = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


def test_ranks_come_from_the_launcher():
    assert launched_ranks(LAUNCHED) == Ranks(3, 1, 4, 1)
    # Ranks on this machine, as torchrun and as DeepSpeed's launcher say it.
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        assert launched_ranks(LAUNCHED | {name: "2"}) == Ranks(3, 1, 4, 2)
    assert launched_ranks({}) is None
    # A shell of a batch system may say this without having started any rank.
    assert launched_ranks({"WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1"}) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"MASTER_PORT": ""}, "but not MASTER_PORT"),
        ({"MASTER_PORT": "abc"}, r"MASTER_PORT ('abc') is no number"),
        ({"RANK": "x"}, "RANK ('x') is no number"),
        ({"RANK": "-1"}, "RANK ('-1') is no number"),
        ({"RANK": "4"}, r"RANK \(4\) must be below WORLD_SIZE \(4\)"),
    ],
)
def test_a_launcher_that_makes_no_sense_is_refused(change, expected):
    with pytest.raises(ConfigError, match=expected.replace("('", r"\('").replace("')", r"'\)")):
        launched_ranks(LAUNCHED | change)


@pytest.mark.parametrize(
    ("changes", "world", "expected"),
    [
        ({"parallel.expert_parallel_size": 2}, 3, r"\(2\) must divide the number of ranks \(3\)"),
        (
            {"parallel.expert_parallel_size": 3, "training.batch_size": 6},
            3,
            r"\(3\) must divide model.moe.num_experts \(4\)",
        ),
        (
            {"parallel.expert_parallel_size": 2, "model.feed_forward": "dense", "model.moe": ...},
            2,
            r"expert_parallel_size \(2\) has no effect without routed experts",
        ),
        ({}, 3, r"training.batch_size \(4\) must be a multiple of"),
        ({"training.micro_batch_size": 4}, 2, r"training.batch_size \(4\) must be a multiple of"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(changes, world, expected):
    with pytest.raises(ConfigError, match=expected):
        check_layout(make_config(Path("unused"), changes), Ranks(0, 0, world))


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ({"gradient_clipping": 1.0}, r"deepspeed.gradient_clipping \(1.0\).*gradient_clip"),
        ({"zero_optimization": {"stage": 2}}, r"zero_optimization.stage \(2\).*zero_stage"),
        ({"train_batch_size": 4}, "training.batch_size"),
        ({"bf16": {"enabled": True}}, "training.precision"),
        ({"comm_logger": {}}, "deepspeed.comm_logger is not passed on; did you mean comms_logger"),
        ({"zero_optimization": 2}, r"zero_optimization \(2\) must be a mapping"),
        (
            {"zero_optimization": {"round_robin_gradients": True}},
            r"round_robin_gradients \(True\) does not work",
        ),
        (
            {"zero_optimization": {"cpu_offload_param": True}},
            r"cpu_offload_param \(True\) is an old name: set offload_optimizer.device or",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "nvme"}}},
            r"offload_optimizer.device \(nvme\) must be cpu or none",
        ),
        (
            {"zero_optimization": {"offload_optimizer": "cpu"}},
            r"offload_optimizer \('cpu'\) must be a mapping",
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            "offload_optimizer.ratio is not passed on",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            "offload_param needs parallel.zero_stage 3 or more, it is 1",
        ),
    ],
)
def test_deepspeed_settings_that_follow_from_ours_are_refused(user, expected):
    config = make_config(Path("unused"), {"deepspeed": user})
    with pytest.raises(ConfigError, match=expected):
        derive_config(config, Ranks(0, 0, 1), "float32")


@pytest.mark.parametrize(
    "user",
    [
        {"comms_logger": 3},
        {"comms_logger": {"enabled": "maybe"}},
        {"flops_profiler": 1},
        {"communication_data_type": 3},
        {"wall_clock_breakdown": "maybe"},
        {"zero_optimization": {1: 2}},
        {"zero_optimization": {"bogus": 1}},
    ],
)
def test_what_deepspeed_says_of_a_setting_is_one_line(user):
    from train.deepspeed_engine import checked_config

    config = make_config(Path("unused"), {"deepspeed": user})
    with pytest.raises(ConfigError, match=r"^deepspeed: [^\n]+$"):
        checked_config(config, Ranks(0, 0, 1), "float32")


def test_other_deepspeed_settings_pass_through():
    user = {
        # More than a count of ours may be.
        "zero_optimization": {"overlap_comm": False, "reduce_bucket_size": 5_000_000_000},
        "comms_logger": {"enabled": True},
    }
    config = make_config(Path("unused"), {"deepspeed": user, "parallel.zero_stage": 2})
    derived = derive_config(config, Ranks(0, 0, 2), "bfloat16")
    assert derived["zero_optimization"] == {"stage": 2, **user["zero_optimization"]}
    assert derived["comms_logger"] == {"enabled": True}
    assert derived["train_batch_size"] == 4
    assert derived["train_micro_batch_size_per_gpu"] == 2
    assert derived["gradient_accumulation_steps"] == 1
    assert derived["torch_autocast"]["enabled"]
    # Our own configuration is not changed by DeepSpeed's.
    assert config.deepspeed == user


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_we_clip_where_deepspeed_would_count_experts_wrongly(stage):
    config = make_config(Path("unused"), {"parallel.zero_stage": stage})
    derived = derive_config(config, Ranks(0, 0, 1), "float32")
    assert derived["gradient_clipping"] == (1.0 if stage else 0.0)
