"""What does a rank send in a training step? Bytes by kind, counted where process groups are called.

Counted is what leaves a rank. Of an all-to-all these are the parts for other ranks. What else the W
ranks of a group do with a message of n bytes counts as a ring of them sends it, however gloo or
NCCL go about it: an all-reduce 2 n (W-1)/W; a reduce-scatter, an all-gather, and on average a
broadcast or a reduce, n (W-1)/W.

    tokens      all-to-all of rows: to their experts and back, and the gradients of both
    gradients   reductions during the backward pass
    weights     gathered or broadcast numbers: what stage 3 lacks, what stages 1 and 2 have updated
    other       counts, metrics, norms, flags
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor

from train.engine import Engine

KINDS = ("tokens", "gradients", "weights", "other")

# Methods of a process group, by their names in torch 2.11 and later: what they do, which argument
# has the whole message, and how many rounds of a ring it takes.
_COLLECTIVES = {
    "allreduce": ("reduce", 0, 2),
    "allreduce_coalesced": ("reduce", 0, 2),
    "reduce": ("reduce", 0, 1),
    "reduce_scatter": ("reduce", 1, 1),
    "_reduce_scatter_base": ("reduce", 1, 1),
    "reduce_scatter_single": ("reduce", 1, 1),
    "reduce_scatter_tensor_coalesced": ("reduce", 1, 1),
    "reduce_scatter_single_coalesced": ("reduce", 1, 1),
    "broadcast": ("gather", 0, 1),
    "allgather": ("gather", 0, 1),
    "allgather_coalesced": ("gather", 0, 1),
    "_allgather_base": ("gather", 0, 1),
    "all_gather_single": ("gather", 0, 1),
    "allgather_into_tensor_coalesced": ("gather", 0, 1),
    "all_gather_single_coalesced": ("gather", 0, 1),
    "alltoall_base": ("exchange", 1, 1),
    "all_to_all_single": ("exchange", 1, 1),
}
# No step calls these; one that comes to must not go uncounted.
_UNKNOWN = ("alltoall", "gather", "scatter", "send", "recv", "recv_anysource")


@contextlib.contextmanager
def counted(engine: Engine) -> Iterator[dict[str, int]]:
    """Bytes that this rank sends in the block, by kind.

    Wraps the methods of process groups, below the functions of `torch.distributed`: DeepSpeed keeps
    some of those functions from its start on, and would go past wrappers around them.

    Args: engine: whose `backward` tells gradients from other sums.
    """
    sent = dict.fromkeys(KINDS, 0)
    in_backward = False
    real_backward = engine.backward

    def backward(loss: Tensor, *, last: bool) -> None:
        nonlocal in_backward
        in_backward = True
        real_backward(loss, last=last)
        in_backward = False

    def counting(name: str) -> Callable[..., Any]:
        real = getattr(dist.ProcessGroup, name)

        def method(group: dist.ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            if name in _UNKNOWN:
                raise RuntimeError(f"train.traffic does not know what {name} sends")
            numbers, count = bytes_sent(name, args, group.rank(), group.size())
            sent[_kind(name, numbers, in_backward)] += count
            return real(group, *args, **kwargs)

        return method

    # From the class's own dictionary: read as an attribute, a method of C++ forgets that it is one.
    methods = vars(dist.ProcessGroup)
    originals = {name: methods[name] for name in (*_COLLECTIVES, *_UNKNOWN) if name in methods}
    try:
        engine.backward = backward  # type: ignore[method-assign]
        for name in originals:
            setattr(dist.ProcessGroup, name, counting(name))
        yield sent
    finally:
        for name, original in originals.items():
            setattr(dist.ProcessGroup, name, original)
        del engine.backward


def bytes_sent(name: str, args: tuple[Any, ...], rank: int, size: int) -> tuple[Tensor, int]:
    """The first tensor of a message, and how many bytes leave this rank.

    Args:
        name: of a process group's method. args: what it is called with.
        rank, size: this rank's place in the group, and W.
    """
    does, place, rounds = _COLLECTIVES[name]
    tensors = list(_tensors(args[place]))
    whole = sum(x.numel() * x.element_size() for x in tensors)
    if does != "exchange":
        return tensors[0], rounds * whole * (size - 1) // size
    # Without split sizes each rank gets as many rows.
    (rows,), splits = tensors, args[3]
    staying = splits[rank] if splits else rows.shape[0] // size
    return rows, whole - staying * math.prod(rows.shape[1:]) * rows.element_size()


def _tensors(message: Any) -> Iterator[Tensor]:
    if isinstance(message, Tensor):
        yield message
        return
    for part in message:
        yield from _tensors(part)


def _kind(name: str, numbers: Tensor, in_backward: bool) -> str:
    does = _COLLECTIVES[name][0]
    if not numbers.is_floating_point():
        return "other"
    if does == "reduce":
        return "gradients" if in_backward else "other"
    return "tokens" if does == "exchange" else "weights"
