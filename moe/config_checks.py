"""Does a model's config make sense? Each mistake is a ValueError with settings, values and the way
out; `moe.config` looks for them when a config is made."""

import re
from typing import TYPE_CHECKING

from moe.layer_overrides import check_overrides
from moe.variants import load_variant, variant_names

if TYPE_CHECKING:
    from moe.config import ModelConfig, MoEConfig


def check_attention(config: "ModelConfig") -> None:
    """Widths and heads fit each other."""
    attention = config.attention
    if attention.head_dim is None and config.hidden_size % attention.num_heads:
        raise ValueError(
            f"model.hidden_size ({config.hidden_size}) must be a multiple of "
            f"model.attention.num_heads ({attention.num_heads}), or give "
            f"model.attention.head_dim"
        )
    if config.head_dim % 2:
        raise ValueError(
            f"model.attention.head_dim ({config.head_dim}) must be even: RoPE rotates pairs"
        )
    if attention.num_heads % config.num_kv_heads:
        raise ValueError(
            f"model.attention.num_heads ({attention.num_heads}) must be a multiple of "
            f"model.attention.num_kv_heads ({config.num_kv_heads})"
        )


def check_experts(config: "ModelConfig") -> None:
    """Routed layers, what stands beside them, and losses fit each other."""
    moe = config.moe
    _check_router(config.without_overrides)
    if config.feed_forward == "moe" and not config.moe_layers:
        raise ValueError(
            f"model.moe.num_dense_layers ({moe.num_dense_layers}) and "
            f"model.moe.moe_layer_every ({moe.moe_layer_every}) leave no "
            f"routed layer among model.num_layers ({config.num_layers}); lower them, or "
            f"set model.feed_forward: dense"
        )
    if moe.shared_intermediate_size is not None and moe.num_shared_experts == 0:
        raise ValueError(
            f"model.moe.shared_intermediate_size ({moe.shared_intermediate_size}) has no "
            f"effect while model.moe.num_shared_experts is 0; remove it or add shared experts"
        )
    if moe.shared_gate != "none" and moe.num_shared_experts == 0:
        raise ValueError(
            f"model.moe.shared_gate ({moe.shared_gate}) has no effect while "
            f"model.moe.num_shared_experts is 0; remove it or add shared experts"
        )
    if moe.latent_size is not None and moe.latent_size > config.hidden_size:
        raise ValueError(
            f"model.moe.latent_size ({moe.latent_size}) must not exceed model.hidden_size "
            f"({config.hidden_size}): a latent that is wider holds no more and costs more; lower "
            f"it, or remove it for experts of the full width"
        )
    if moe.dense_intermediate_size is not None and len(config.moe_layers) == config.num_layers:
        raise ValueError(
            f"model.moe.dense_intermediate_size ({moe.dense_intermediate_size}) has no effect "
            f"while every layer is routed; remove it, or set model.moe.num_dense_layers or "
            f"model.moe.moe_layer_every"
        )
    if moe.num_shared_experts or len(config.moe_layers) < config.num_layers:
        # Raises where the experts are of a kind that cannot be dense.
        _ = config.activate
    if moe.drop_priority != "position":
        _check_drop_priority(config)
    names = [loss.name for loss in moe.losses]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"model.moe.losses names {name} twice; keep one line")


def check_layers(config: "ModelConfig") -> None:
    """`model.moe.layers` contradicts neither itself nor the rest."""
    check_overrides(config.moe, config.moe.layers, set(config.routed_blocks))
    for override in config.moe.layers:
        _check_router_at(config, override.layers[0])


def _check_router_at(config: "ModelConfig", layer: int) -> None:
    """`_check_router` of a block, in an error the settings by their place in this config."""
    try:
        _check_router(config.at(layer))
    except ValueError as error:
        names = r"\bmodel\.moe\.(num_experts|router)\b"
        text = re.sub(names, lambda match: config.setting(match[1], layer), str(error))
        raise ValueError(text) from error


def _check_router(config: "ModelConfig") -> None:
    """ValueError on a router that does not fit its experts, or sees later tokens unasked."""
    moe = config.moe
    # First: it names the router's own setting, which need not be top_k.
    costless = sum(moe.zero_computation)
    note = f"; {costless} of these {moe.num_choices} cost nothing" if costless else ""
    try:
        moe.router.check_experts(moe.num_choices)
    except ValueError as error:
        raise ValueError(f"{error}{note}") from error
    if config.top_k > moe.num_choices:
        raise ValueError(
            f"model.moe.router.top_k ({config.top_k}) must not exceed "
            f"model.moe.num_experts ({moe.num_choices}){note}"
        )
    if config.moe_layers and not config.router_causal and not moe.allow_non_causal:
        raise ValueError(
            f"model.moe.router.name ({moe.router.name}) lets a token see later ones, which "
            f"spoils language modelling; set model.moe.allow_non_causal: true to use it anyway"
        )
    if config.moe_layers:
        _check_noise(moe)


def _check_noise(moe: "MoEConfig") -> None:
    """ValueError on a loss that needs a noise which the router does not draw."""
    needy = [loss.name for loss in moe.losses if loss.needs_noise]
    if needy and not _draws_noise(moe.router.name):
        noisy = ", ".join(name for name in variant_names("routers") if _draws_noise(name))
        raise ValueError(
            f"model.moe.losses names {needy[0]}, which needs a router that draws noise on its "
            f"logits; model.moe.router.name ({moe.router.name}) does not: take {noisy}, or another "
            f"loss, such as importance"
        )


def _draws_noise(router: str) -> bool:
    return load_variant("routers", router).Router.draws_noise


def _check_drop_priority(config: "ModelConfig") -> None:
    """ValueError on a drop_priority that has no effect or is not to be had."""
    moe = config.moe
    if not moe.drops:
        raise ValueError(
            f"model.moe.drop_priority ({moe.drop_priority}) has no effect without a capacity; "
            f"set model.moe.capacity_factor or leave it out"
        )
    if not moe.allow_non_causal:
        raise ValueError(
            f"model.moe.drop_priority ({moe.drop_priority}) lets later tokens decide whether "
            f"one is dropped, which spoils language modelling; take position, or set "
            f"model.moe.allow_non_causal: true to use it anyway"
        )
    if moe.drop_priority == "random" and moe.eval_capacity_factor is not None:
        raise ValueError(
            f"model.moe.eval_capacity_factor ({moe.eval_capacity_factor}) with "
            f"model.moe.drop_priority (random) would make evaluation random; leave it out, "
            f"or take position or probability"
        )
