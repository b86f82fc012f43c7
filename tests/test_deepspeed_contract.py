"""Is DeepSpeed built the way `train` relies on? Each private or young part of it, by its name.

After an upgrade this says which part is gone or has changed; the other tests of many ranks would
fail far from the cause, or, where a layout has changed, not at all.
"""

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_cases import TIMEOUT_MINUTES, run_ranks
from torch import Tensor
from training_cases import data, make_config

from train.config import RunConfig
from train.packing import Batch, TrainLoader
from train.ranks import Ranks
from train.step import batch_totals, read_step
from train.work_clock import WorkClock

SETTINGS = {
    "model.moe.router": {"name": "topk"},
    "model.moe.num_shared_experts": 1,
    "training.micro_batch_size": None,
    "training.device": "cpu",
    "optimizer.gradient_clip": None,
    "parallel.timeout_minutes": TIMEOUT_MINUTES,
}
# Stage 3 leaves parameters as small as these where they are, unless told otherwise.
RELEASED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
# What we call, with the arguments that we call it with.
CALLS: dict[str, tuple[tuple, dict[str, Any]]] = {
    "deepspeed.init_distributed": (("gloo",), {"timeout": 0, "verbose": False}),
    "deepspeed.initialize": (
        (),
        {"model": 0, "optimizer": 0, "model_parameters": [], "config": {}}
        | {"dist_init_required": False},
    ),
    "deepspeed.DeepSpeedConfig": (({},), {}),
    "deepspeed.zero.Init": ((), {"config_dict_or_path": {}}),
    "deepspeed.runtime.zero.GatheredParameters": (([],), {"modifier_rank": 0}),
    "deepspeed.DeepSpeedEngine.backward": ((0, 0), {"scale_wrt_gas": False}),
    "deepspeed.DeepSpeedEngine.set_gradient_accumulation_boundary": ((0, True), {}),
    "deepspeed.utils.groups._create_expert_and_data_parallel": ((2,), {}),
    "deepspeed.utils.groups._get_expert_parallel_group_dict": ((), {}),
    "deepspeed.utils.groups._get_expert_parallel_group": (("ep_size_2",), {}),
    "deepspeed.utils.groups._get_expert_data_parallel_group": (("ep_size_2",), {}),
    "deepspeed.utils.groups._get_expert_parallel_rank": (("ep_size_2",), {}),
    "deepspeed.utils.groups._get_data_parallel_group": ((), {}),
    "deepspeed.utils.safe_get_local_grad": ((0,), {}),
    "deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer": (([],), {}),
    "deepspeed.module_inject.auto_ep_layer.AutoEPMoELayer.set_deepspeed_parallelism": ((0,), {}),
    "torch.distributed.distributed_c10d._set_pg_timeout": ((timedelta(minutes=1), None), {}),
}


class Problems(list[str]):
    """What is not as we rely on it, a line for each part."""

    @contextlib.contextmanager
    def of(self, part: str, meaning: str) -> Iterator[None]:
        """Checks of one part; the first that fails is written down with what we take it for."""
        try:
            yield
        except Exception as error:
            said = str(error).partition("\n")[0]
            line = f"{part}: no longer {meaning} ({type(error).__name__}: {said})"
            if not any(known.startswith(f"{part}: no longer {meaning}") for known in self):
                self.append(line)


def named(path: str) -> Any:
    """What a dotted path leads to: the longest module in it, and attributes from there."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(path)


def check_names(problems: Problems) -> None:
    """Everything that we call is there, and takes our arguments."""
    for path, (args, kwargs) in CALLS.items():
        with problems.of(path, "there, with the arguments that we give"):
            inspect.signature(named(path)).bind(*args, **kwargs)
    with problems.of("deepspeed.ops.__compatible_ops__", "what keeps C++ from being compiled"):
        from deepspeed.comm.torch import build_shm_op
        from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder

        assert ShareMemCommBuilder.NAME == "deepspeed_shm_comm"
        # `connect` has switched it off.
        assert named("deepspeed.ops.__compatible_ops__")["deepspeed_shm_comm"] is False
        assert build_shm_op() is None


def check_groups(problems: Problems) -> None:
    """Neighbours share one set of experts; expert-data groups have the same experts."""
    from train.expert_parallel import ExpertGroups

    rank, everyone = dist.get_rank(), list(range(dist.get_world_size()))
    for size, peers, same in ((1, [rank], everyone), (2, everyone, [rank])):
        with problems.of(
            "deepspeed.utils.groups", f"groups of {size} neighbours, and of those between"
        ):
            groups = ExpertGroups(size, TIMEOUT_MINUTES, WorkClock("cpu"))
            assert dist.get_process_group_ranks(groups.group) == peers
            assert dist.get_process_group_ranks(groups.data_group) == same
            assert groups.rank == rank % size
            data_group = named("deepspeed.utils.groups._get_data_parallel_group")()
            assert dist.get_process_group_ranks(data_group) == everyone


def check_split(problems: Problems) -> None:
    with problems.of(
        "split_params_into_different_moe_groups_for_optimizer",
        "what takes experts out of each group, with its settings",
    ):
        split = named("deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer")
        plain, expert = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
        expert.allreduce, expert.group_name = False, "ep_size_2"  # type: ignore[attr-defined]
        found = split([{"params": [plain, expert], "weight_decay": 0.1, "name": "group_0"}])
        first, second = found
        assert [len(group["params"]) for group in found] == [1, 1]
        assert first["params"][0] is plain and not first.get("moe", False)
        assert second["params"][0] is expert and second["moe"] and second["name"] == "ep_size_2"
        assert first["weight_decay"] == second["weight_decay"] == 0.1


def forward_and_backward(engine: Any, batches: list[Batch], config: RunConfig) -> None:
    """The gradients of one step, not yet used."""
    totals = batch_totals(engine, batches, config, lambda: False)
    for number, batch in enumerate(batches, start=1):
        engine.backward(engine(batch, totals).loss, last=number == len(batches))


class Whole:
    """Weights and gradients of the whole model, from the engine of one process.

    cut: this rank's numbers of a parameter's part, which is `[start : start + count]` of its own
    share of the experts where it is a stack of them.
    """

    def __init__(self, config: RunConfig, batches: list[Batch]):
        from train.engine import build_engine

        engine: Any = build_engine(config, config.model)
        forward_and_backward(engine, batches, config)
        self.norm = engine.gradient_norm()
        self.weights = dict(engine.model.named_parameters())

    def cut(self, engine: Any, name: str, start: int, count: int) -> tuple[Tensor, Tensor]:
        from train.expert_parallel import is_expert
        from train.fragments import first_experts, local_shape

        whole = self.weights[name]
        local = dict(engine.model.named_parameters())[name]
        stack = local_shape(local)[0]
        first = first_experts(engine.model).get(name, 0)
        rows = slice(first, first + stack)
        rows = rows if is_expert(local) else slice(None)
        pair = whole.detach()[rows], whole.grad[rows]
        weights, gradient = (x.reshape(-1)[start : start + count] for x in pair)
        return weights, gradient


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def check_engine(engine: Any, whole: Whole, problems: Problems) -> None:
    """What every stage has, after the backward pass of a step."""
    deepspeed = engine.engine
    with problems.of("DeepSpeedEngine.has_moe_layers", "True for a subclass of AutoEPMoELayer"):
        assert deepspeed.has_moe_layers is True
    with problems.of("DeepSpeedEngine.module", "our model, with our parameters' names"):
        names = [name for name, _ in engine.model.named_parameters()]
        assert [name for name, _ in deepspeed.module.named_parameters()] == names
    with problems.of("DeepSpeedEngine.optimizer", "what holds PyTorch's, and has its groups"):
        assert isinstance(engine._optimizer, torch.optim.AdamW)
        assert deepspeed.optimizer.param_groups == engine._optimizer.param_groups
    with problems.of(
        "DeepSpeedEngine.backward", "a sum over ranks, divided by the number of ranks alone"
    ):
        close(engine.gradient_norm(), whole.norm)


def check_stage_0(engine: Any, whole: Whole, problems: Problems) -> None:
    with problems.of("ZeRO stage 0", "gradients in .grad, whole on every rank"):
        for name, parameter in engine.model.named_parameters():
            wanted = whole.cut(engine, name, 0, parameter.numel())
            close(parameter.detach().view(-1), wanted[0])
            close(parameter.grad.view(-1), wanted[1])


def check_stage_1_and_2(engine: Any, whole: Whole, problems: Problems) -> None:
    optimizer = engine.engine.optimizer
    mappings = {}
    with problems.of("parameter._hp_mapping", "this rank's part of a parameter, or None"):
        for name, parameter in engine.model.named_parameters():
            if (mapping := parameter._hp_mapping) is not None:
                at = mapping.lp_fragment_address.start
                mappings[name] = parameter, mapping, at, mapping.hp_fragment.numel()
                wanted, _ = whole.cut(engine, name, at, mapping.hp_fragment.numel())
                assert mapping.hp_fragment.dtype == torch.float32
                close(mapping.hp_fragment, wanted)
    with problems.of(
        "optimizer.single_partition_of_fp32_groups",
        "the memory of _hp_mapping.hp_fragment, from hp_fragment_address.start on",
    ):
        for _, mapping, _, count in mappings.values():
            flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            part = flat.narrow(0, mapping.hp_fragment_address.start, count)
            assert part.data_ptr() == mapping.hp_fragment.data_ptr()
            # The key of the moments.
            assert any(flat is p for group in optimizer.param_groups for p in group["params"])
    with problems.of(
        "_hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)",
        "the gradient of this rank's part",
    ):
        for name, (parameter, mapping, at, count) in mappings.items():
            gradient = mapping.get_lp_grad_fragment(parameter._index_in_param_group)
            close(gradient.view(-1), whole.cut(engine, name, at, count)[1])
    with problems.of("optimizer.averaged_gradients", "the gradients, by number of the group"):
        groups = set(range(len(optimizer.single_partition_of_fp32_groups)))
        assert set(optimizer.averaged_gradients) == groups
        assert all(gradients is not None for gradients in optimizer.averaged_gradients.values())
    with problems.of("optimizer.micro_step_id", "the number of backward passes of a step, from 0"):
        assert optimizer.micro_step_id >= 0


def check_dropped_step(
    engine: Any, whole: Whole, batches: list[Batch], config: RunConfig, problems: Problems
) -> None:
    """A pass whose step was dropped leaves nothing in the next step's gradients."""
    with problems.of(
        "optimizer.averaged_gradients, all_grad_tensors and micro_step_id",
        "all that holds the gradients of a dropped step",
    ):
        engine.zero_grad()
        if engine.stage in (1, 2):
            optimizer = engine.engine.optimizer
            assert set(optimizer.all_grad_tensors) == set(optimizer.averaged_gradients)
        totals = batch_totals(engine, batches, config, lambda: False)
        engine.backward(engine(batches[0], totals).loss, last=False)
        engine.zero_grad()
        forward_and_backward(engine, batches, config)
        close(engine.gradient_norm(), whole.norm)


def check_stage_3(engine: Any, whole: Whole, problems: Problems) -> None:
    from deepspeed.utils import safe_get_local_grad

    from train.expert_parallel import is_expert

    optimizer, parts = engine.engine.optimizer, {}
    for name, parameter in engine.model.named_parameters():
        group = engine.groups.data_group if is_expert(parameter) else dist.group.WORLD
        with problems.of(
            "parameter.ds_process_group",
            "the expert-data group for an expert, all ranks for what is no expert",
        ):
            sharing = dist.get_process_group_ranks(parameter.ds_process_group)
            assert sharing == dist.get_process_group_ranks(group), name
        with problems.of(
            "optimizer._get_param_partition_rank, partition_numel, ds_numel and ds_shape",
            "the place and size of this rank's part",
        ):
            size = parameter.partition_numel()
            start = size * optimizer._get_param_partition_rank(parameter)
            held = min(size, parameter.ds_numel - start)
            assert torch.Size(parameter.ds_shape).numel() == parameter.ds_numel
            parts[name] = parameter, start, held
            wanted, _ = whole.cut(engine, name, start, held)
            close(parameter.ds_tensor.view(-1)[:held], wanted)
    for name, (parameter, start, held) in parts.items():
        weights, gradient = whole.cut(engine, name, start, held)
        with problems.of(
            "optimizer.grad_position, get_param_id and fp32_partitioned_groups_flat",
            "where the float32 weights of this rank's part are",
        ):
            group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            flat = optimizer.fp32_partitioned_groups_flat[group]
            close(flat.detach().narrow(0, offset, held), weights)
        with problems.of("safe_get_local_grad", "the gradient of this rank's part"):
            close(safe_get_local_grad(parameter).view(-1)[:held], gradient)


def check_partitioned_model(problems: Problems) -> None:
    """What a model is made of that is partitioned as it is made."""
    import deepspeed

    from train.expert_parallel import gathered, parameters_seen

    def mark(parameter: Any) -> None:
        parameter.ds_zero_partition_process_group = alone

    rank = dist.get_rank()
    alone = [dist.new_group([number]) for number in range(dist.get_world_size())][rank]
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 2}):
        shared = torch.nn.Linear(4, 3, bias=False)
        with parameters_seen(mark):
            own = torch.nn.Linear(4, 3, bias=False)
    with problems.of("zero.Init", "what partitions a parameter in its own group as it is made"):
        assert shared.weight.numel() == own.weight.numel() == 0
        assert (shared.weight.partition_numel(), own.weight.partition_numel()) == (6, 12)
    with gathered(shared), torch.no_grad():
        whole = shared.weight.shape
        shared.weight.fill_(5 + rank)
    with problems.of("GatheredParameters", "the whole inside, and what rank 0 made of it after"):
        assert whole == (3, 4) and shared.weight.numel() == 0
        assert torch.equal(shared.weight.ds_tensor, torch.full((6,), 5.0))


def check_moments(engine: Any, problems: Problems) -> None:
    """After a step, which uses the gradients up."""
    engine.step(0.01, torch.tensor(1.0))
    with problems.of("the optimizer's state", "by the flat tensor that holds a part"):
        from train.fragments import held_parts

        for part in held_parts(engine.engine, engine.stage):
            state = engine._optimizer.state[part.flat]
            assert {"exp_avg", "exp_avg_sq", "step"} <= set(state), part.name
            assert state["exp_avg"].shape == part.flat.shape


Spoil = Callable[[Any, pytest.MonkeyPatch], None]


def spoil_mapping(engine: Any, patch: pytest.MonkeyPatch) -> None:
    patch.delattr(next(engine.model.parameters()), "_hp_mapping")


def spoil_index(engine: Any, patch: pytest.MonkeyPatch) -> None:
    for parameter in engine.model.parameters():
        if getattr(parameter, "_index_in_param_group", 0):
            patch.setattr(parameter, "_index_in_param_group", 0)


def spoil_optimizer(name: str, value: Any = None) -> Spoil:
    return lambda engine, patch: patch.setattr(engine.engine.optimizer, name, value)


def other_rank(parameter: Any) -> int:
    return 1 - dist.get_rank(parameter.ds_process_group)


# What an upgrade might do, by the ZeRO stage whose check must say so, and what it must name.
SPOILS: list[tuple[int, str, Spoil]] = [
    (0, "has_moe_layers", lambda engine, p: p.setattr(engine.engine, "has_moe_layers", False)),
    (0, "DeepSpeedEngine.backward", lambda engine, p: p.setattr(engine, "world_size", 1)),
    (1, "_hp_mapping", spoil_mapping),
    (1, "_index_in_param_group", spoil_index),
    (2, "single_partition_of_fp32_groups", spoil_optimizer("single_partition_of_fp32_groups", [])),
    (2, "averaged_gradients", spoil_optimizer("averaged_gradients", {})),
    (3, "grad_position", spoil_optimizer("grad_position", {})),
    (3, "_get_param_partition_rank", spoil_optimizer("_get_param_partition_rank", other_rank)),
    (3, "fp32_partitioned_groups_flat", spoil_optimizer("fp32_partitioned_groups_flat", [])),
]
STAGES = {0: check_stage_0, 1: check_stage_1_and_2, 2: check_stage_1_and_2, 3: check_stage_3}


def check_stages(ranks: Ranks, text: Any, problems: Problems) -> list[tuple[str, Problems]]:
    """Each stage as it is; then, spoiled, what its check says of each part."""
    from train.engine import build_engine

    spoiled = []
    for stage, check in STAGES.items():
        layout = {"parallel.zero_stage": stage, "parallel.expert_parallel_size": 2}
        deepspeed = {"deepspeed": RELEASED if stage == 3 else {}}
        config = make_config(Path("unused"), SETTINGS | layout | deepspeed)
        loader = TrainLoader(text, config.training.seq_len, config.seed)
        whole = Whole(config, [loader.batch(0, config.training.batch_size)])
        with problems.of("deepspeed.initialize", f"an engine for our model at stage {stage}"):
            engine: Any = build_engine(config, config.model, ranks=ranks)
        if problems:
            break
        batches = read_step(loader, 0, config, engine)
        with problems.of("DeepSpeedEngine", "what goes forward and backward"):
            forward_and_backward(engine, batches, config)
        check(engine, whole, problems)
        # What follows would fail for the same reasons.
        if not problems:
            check_engine(engine, whole, problems)
        if problems:
            break
        for wanted, part, spoil in SPOILS:
            if wanted == stage:
                spoiled.append((part, found := Problems()))
                with pytest.MonkeyPatch.context() as patch:
                    spoil(engine, patch)
                    if part == "DeepSpeedEngine.backward":
                        engine.zero_grad()
                        forward_and_backward(engine, batches, config)
                    (check if stage else check_engine)(engine, whole, found)
        check_dropped_step(engine, whole, batches, config, problems)
        if not problems:
            check_moments(engine, problems)
    return spoiled


def contract(ranks: Ranks, text: Any) -> tuple[Problems, list[tuple[str, Problems]]]:
    """On each rank: what is not as it was, and what the checks say of parts spoiled on purpose."""
    problems, spoiled = Problems(), []
    check_names(problems)
    # Each step needs what the one before has checked.
    for check in (check_groups, check_split, check_partitioned_model):
        if not problems:
            check(problems)
    if problems:
        return problems, spoiled
    for path in CALLS:
        with pytest.MonkeyPatch.context() as patch:
            owner, _, name = path.rpartition(".")
            patch.delattr(named(owner), name)
            spoiled.append((path, found := Problems()))
            check_names(found)
    return problems, spoiled + check_stages(ranks, text, problems)


def test_deepspeed_is_as_we_rely_on_it():
    """Nothing has changed, and a part that is gone or changed is named."""
    for problems, spoiled in run_ranks(2, contract, data(), seconds=120):
        assert not problems, "DeepSpeed has changed:\n" + "\n".join(problems)
        assert len(spoiled) == len(CALLS) + len(SPOILS)
        for part, found in spoiled:
            assert any(part in line.partition(":")[0] for line in found), (part, found)


def timeouts(ranks: Ranks) -> list[tuple[list[int], float]]:
    """(ranks, minutes) of every group there is, after engines of every layout were built."""
    from train.engine import build_engine

    for size in (1, 2):
        for stage in (0, 1, 2, 3):
            layout = {"parallel.expert_parallel_size": size, "parallel.zero_stage": stage}
            config = make_config(Path("unused"), SETTINGS | layout)
            build_engine(config, config.model, ranks=ranks)
    return [
        (dist.get_process_group_ranks(group), backend.options._timeout / timedelta(minutes=1))
        for group in dist.distributed_c10d._world.pg_map
        for backend in [group._get_backend(torch.device("cpu"))]
    ]


def test_every_group_of_ranks_gives_up_after_the_configured_time():
    """The groups that DeepSpeed makes by itself too: PyTorch's default is 30 minutes."""
    for rank, found in enumerate(run_ranks(2, timeouts)):
        # The world, what is no expert, and for each size an expert and an expert-data group.
        assert len(found) >= 6 and [rank] in [ranks for ranks, _ in found]
        assert {minutes for _, minutes in found} == {TIMEOUT_MINUTES}, found
