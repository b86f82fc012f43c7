"""Which part of each weight and its moments does a rank hold? Read and written at ZeRO stages 0-3.

A fragment is a piece of one flattened tensor: its name (experts under their global number), where
it begins, and the numbers. Over all ranks the fragments of a name cover it exactly once. Only this
file knows where DeepSpeed keeps them:

    stage 0     whole in the optimizer; the ranks with the same tensor share it out for writing
    stage 1, 2  in the flat partitions of the optimizer, by each parameter's mapping into them
    stage 3     in the partitions of each parameter
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe.layer import MoELayer
from train.expert_names import expert_name
from train.stored_tensors import numbers_of


class Fragment(NamedTuple):
    """Numbers `start` to `start + values.numel()` of the flattened tensor `name`, (n,) float32."""

    name: str
    start: int
    values: Tensor


class Part(NamedTuple):
    """This rank's part of one parameter: where it begins in the flattened parameter, the float32
    weights, the flat tensor that the optimizer knows and where the part lies in that; of experts,
    the global number of the first one in this process."""

    name: str
    parameter: Any
    start: int
    weights: Tensor
    flat: Tensor
    offset: int
    first_expert: int


def first_experts(model: nn.Module) -> dict[str, int]:
    """Global number of the first expert in this process, by parameter of experts."""
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, MoELayer))
    return {
        f"{name}.experts.{parameter}": layer.first_expert
        for name, layer in layers
        for parameter, _ in layer.experts.named_parameters()
    }


def held_parts(engine: Any, stage: int) -> Iterator[Part]:
    """Every part that this rank holds, views into the optimizer's own memory.

    Args: engine: DeepSpeed's.
    """
    firsts = first_experts(engine.module)
    for name, parameter in engine.module.named_parameters():
        first = firsts.get(name, 0)
        if stage == 0:
            whole = parameter.data.view(-1)
            yield Part(name, parameter, 0, whole, parameter, 0, first)
        elif stage == 3:
            yield from _partition(engine.optimizer, name, parameter, first)
        elif (mapping := parameter._hp_mapping) is not None:
            at = mapping.lp_fragment_address.start
            flat = engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            offset = mapping.hp_fragment_address.start
            yield Part(name, parameter, at, mapping.hp_fragment, flat, offset, first)


def _partition(optimizer: Any, name: str, parameter: Any, first_expert: int) -> Iterator[Part]:
    """Stage 3: each rank of the parameter's group has an equal part; the last ones are padded."""
    size = parameter.partition_numel()
    start = size * optimizer._get_param_partition_rank(parameter)
    held = min(size, parameter.ds_numel - start)
    if held > 0:
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        flat = optimizer.fp32_partitioned_groups_flat[group]
        weights = flat.narrow(0, offset, held)
        yield Part(name, parameter, start, weights, flat, offset, first_expert)


def gradient_of(stage: int, part: Part) -> Tensor | None:
    """The gradient of this rank's part, after the backward pass of a step's last micro-batch."""
    from deepspeed.utils import safe_get_local_grad

    parameter = part.parameter
    if stage == 0:
        return None if parameter.grad is None else parameter.grad.view(-1)
    if stage == 3:
        return safe_get_local_grad(parameter).view(-1)[: part.weights.numel()]
    return parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group).view(-1)


def moments_of(optimizer: torch.optim.Optimizer, part: Part) -> dict[str, Tensor]:
    """This rank's part of the moments, views; and what is one number, such as `step`."""
    found = {}
    for key, value in optimizer.state.get(part.flat, {}).items():
        if value.dim():
            value = value.view(-1).narrow(0, part.offset, part.weights.numel())
        found[key] = value
    return found


def local_shape(parameter: Any) -> torch.Size:
    """Shape of a parameter as this rank's model has it, also where stage 3 has emptied it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def split_part(part: Part, values: Tensor) -> Iterator[Fragment]:
    """`values` (n,) of a part, as fragments of single experts where the parameter is a stack."""
    if expert_name(part.name, 0) is None:
        yield Fragment(part.name, part.start, values)
        return
    size = local_shape(part.parameter)[1:].numel()
    first, end = part.start, part.start + values.numel()
    for expert in range(first // size, -(-end // size)):
        begin, stop = max(first, expert * size), min(end, (expert + 1) * size)
        name = expert_name(part.name, part.first_expert + expert)
        assert name is not None
        yield Fragment(name, begin - expert * size, values[begin - first : stop - first])


def fill(part: Part, target: Tensor, tensors: Mapping[str, Tensor]) -> None:
    """Copy a part's numbers, from whole tensors, into `target` (n,)."""
    for name, start, values in split_part(part, target):
        values.copy_(numbers_of(tensors, name, start, start + values.numel()))
