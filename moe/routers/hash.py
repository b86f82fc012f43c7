"""Hash routing: a token's experts are fixed by its id, and never learned.

    key[e] = mix64(id, seed, layer, e)
    experts of an id: the K with the largest keys, K different ones, the same on every device
    weights: 1/K each (1 each without `normalize`), or with `weights: learned` softmax(W x),
    sigmoid(W x) or sqrt(softplus(W x)) at these experts, divided by their sum if `normalize`

mix64 is the finaliser of SplitMix64, a bijection of 64 bits: the keys of one id all differ, so no
tie is left to a device. Each layer hashes anew. Ids spread evenly; tokens do not, since text
repeats a few ids: the paper's balanced table, made from a corpus, is not here. Needs no loss.

Causal. Sources: Roller et al., Hash Layers, arXiv 2106.04426, random hash; learned weights at
hashed experts: DeepSeek-V4, the first routed layers; mixing: Steele et al., SplitMix, OOPSLA 2014.
"""

from typing import Literal

import torch
from torch import Tensor

from moe.router import AssignedConfig, AssignedRouter
from moe.routing import SPLITMIX_STEP, RouterContext
from moe.variants import Natural

EXAMPLES = (
    {"weights": "learned", "score": "sqrt_softplus", "top_k": 3},
    {"weights": "learned", "normalize": False, "top_k": 1},
    {"seed": 7, "normalize": False},
)


class Config(AssignedConfig):
    """top_k experts an id; seed of the hash; their weights, and if learned the score."""

    name: Literal["hash"] = "hash"
    seed: Natural = 0


class Router(AssignedRouter):
    """(T, D) -> Routing, by token ids. Learned weights in float32 always."""

    def assign(self, x: Tensor, context: RouterContext) -> Tensor:
        config = self.config
        keys = expert_keys(context.token_ids, self.num_experts, config.seed, context.layer)
        return keys.topk(config.top_k, dim=-1).indices


def expert_keys(token_ids: Tensor, num_experts: int, seed: int, layer: int) -> Tensor:
    """(T, E) int64 keys, those of one id all different; an integer hash that no device rounds."""
    hashed = _mix(token_ids.long() + _signed(SPLITMIX_STEP * (seed + 1)))
    hashed = _mix(hashed + _signed(SPLITMIX_STEP * (layer + 1)))  # (T,)
    experts = torch.arange(num_experts, device=token_ids.device)
    return _mix(hashed.unsqueeze(-1) + experts * _signed(SPLITMIX_STEP))


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser; int64 products wrap around as unsigned ones do."""
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """To the right as unsigned: PyTorch's shift repeats the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    return ((value + (1 << 63)) % (1 << 64)) - (1 << 63)
