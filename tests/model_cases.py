"""What the tests of the model share: tiny configs, and models with weights that matter."""

from typing import Any

import torch
from conftest import randn
from torch import Tensor

from moe.config import ModelConfig
from moe.layer import MoELayer
from moe.model import MoETransformer, init_weights
from moe.routing import RouterContext

TINY: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 24,
    "num_layers": 2,
    "attention": {"num_heads": 4, "num_kv_heads": 2},
    "moe": {"num_experts": 6, "intermediate_size": 14, "router": {"name": "topk", "top_k": 2}},
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` in it, section by section; a router or an expert is replaced whole."""
    out = dict(base)
    for key, value in changes.items():
        section = isinstance(value, dict) and "name" not in value
        out[key] = merged(base.get(key, {}), value) if section else value
    return out


def tiny_config(**changes: Any) -> ModelConfig:
    """The tiny config with some settings changed."""
    return ModelConfig.model_validate(merged(TINY, changes))


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> MoETransformer:
    """A tiny model whose routers have opinions: weights of 0.3, where 0.02 would hardly mix."""
    config = tiny_config(**({"init_std": 0.3} | changes))
    model = MoETransformer(config)
    init_weights(model, seed)
    return model.to(dtype)


def context(num_tokens: int) -> RouterContext:
    """Of one sequence, outside training."""
    return RouterContext(torch.zeros(num_tokens).long(), None, None, (1, num_tokens), False)


def moe_layer(seed: int = 0, **moe: Any) -> MoELayer:
    """One layer with weights of 0.3, in float64."""
    layer = MoELayer(tiny_config(moe=moe)).double()
    with torch.no_grad():
        for n, parameter in enumerate(layer.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=seed + n) * 0.3)
    return layer


def tokens(batch: int, seq_len: int, seed: int = 1, vocab_size: int = 67) -> Tensor:
    """(B, S) token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (batch, seq_len), generator=generator)
