"""How are the experts of a stack named in a checkpoint? Each alone, by its global number."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from train.errors import CheckpointError

_STACKED = re.compile(r"^(.*\.experts)\.(w\d)$")
_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(w\d)$")


def expert_name(name: str, expert: int) -> str | None:
    """Name of one expert of the stack `name`, `.experts.3.w1`; None if it is no stack."""
    match = _STACKED.match(name)
    return None if match is None else f"{match[1]}.{expert}.{match[2]}"


def split_experts(name: str, value: Tensor, first_expert: int = 0) -> dict[str, Tensor]:
    """One tensor an expert where `name` is a stack of them; else as it is.

    Args: first_expert: global number of the first one in the stack.
    """
    if expert_name(name, 0) is None:
        return {name: value}
    parts = enumerate(value, start=first_expert)
    return {expert_name(name, expert) or name: part for expert, part in parts}


def join_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `split_experts` over a whole state; a scalar kept once for a stack stays.

    Raises:
        CheckpointError: if an expert between others is missing, or their shapes differ.
    """
    joined: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, value in tensors.items():
        match = _EXPERT.match(name)
        if match is None:
            joined[name] = value
        else:
            layer, expert, matrix = match.groups()
            stacks.setdefault(f"{layer}.{matrix}", {})[int(expert)] = value
    for name, parts in stacks.items():
        if sorted(parts) != list(range(len(parts))):
            raise CheckpointError(f"{name} has experts {sorted(parts)}: some are missing")
        if len({part.shape for part in parts.values()}) > 1:
            raise CheckpointError(f"{name} has experts of several shapes")
        joined[name] = torch.stack([parts[expert] for expert in range(len(parts))])
    return joined
