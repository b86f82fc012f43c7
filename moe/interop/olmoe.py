"""How does an OLMoE model of Hugging Face become ours, and ours one of theirs?

Tensor names and layouts, without importing `transformers`. {l} is a layer, {e} an expert:

    ours                                    theirs
    embedding.weight                        model.embed_tokens.weight
    blocks.{l}.attention.wq.weight          model.layers.{l}.self_attn.q_proj.weight
    blocks.{l}.feed_forward.router.weight   model.layers.{l}.mlp.gate.weight
    blocks.{l}.feed_forward.experts.w1      model.layers.{l}.mlp.experts.gate_up_proj[:, :F]
    blocks.{l}.feed_forward.experts.w3      model.layers.{l}.mlp.experts.gate_up_proj[:, F:]
    blocks.{l}.feed_forward.experts.w2      model.layers.{l}.mlp.experts.down_proj

The last three are the names in memory since transformers 5; files hold one matrix an expert:
`model.layers.{l}.mlp.experts.{e}.gate_proj.weight`, `up_proj` and `down_proj`. Both are read.

Source: OLMoE, arXiv 2409.02060; transformers 5.23, `models/olmoe`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe.config import ModelConfig

_TOP = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.router.weight": "mlp.gate.weight",
}
_EXPERT = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

# Settings of OLMoE that this model does not have, and the one value at which they do nothing.
_NEUTRAL = {
    "clip_qkv": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
}


def config_from_hf(hf_config: Any) -> ModelConfig:
    """The config of an OLMoE model.

    Hugging Face's balance loss is K times ours at balance (and pools the layers before the product,
    which ours does not), so its coefficient is multiplied by K.

    Args:
        hf_config: a `transformers.OlmoeConfig`, or the mapping of a `config.json`.
    Raises:
        ValueError: if it is of another family, or has a setting that this model lacks.
    """
    values = dict(hf_config) if isinstance(hf_config, Mapping) else hf_config.to_dict()
    if values.get("model_type") != "olmoe":
        raise ValueError(f"model_type ({values.get('model_type')!r}) must be 'olmoe'")
    for name, neutral in _NEUTRAL.items():
        if (found := values.get(name, neutral)) != neutral:
            raise ValueError(f"{name} ({found!r}) is not supported; this model needs {neutral!r}")
    heads, top_k = values["num_attention_heads"], values["num_experts_per_tok"]
    router = {"name": "topk", "top_k": top_k, "normalize": values.get("norm_topk_prob", False)}
    weight = top_k * values.get("router_aux_loss_coef", 0.01)
    return ModelConfig.model_validate(
        {
            "vocab_size": values["vocab_size"],
            "hidden_size": values["hidden_size"],
            "num_layers": values["num_hidden_layers"],
            "norm_eps": values.get("rms_norm_eps", 1e-5),
            "tie_embeddings": values.get("tie_word_embeddings", False),
            "init_std": values.get("initializer_range", 0.02),
            "attention": {
                "num_heads": heads,
                "num_kv_heads": values.get("num_key_value_heads") or heads,
                "qk_norm": "projection",
                "rope_theta": _rope_theta(values),
            },
            "moe": {
                "num_experts": values["num_experts"],
                "intermediate_size": values["intermediate_size"],
                "router": router,
                "losses": [{"name": "load_balancing", "weight": weight, "scope": "micro_batch"}],
            },
        }
    )


def _rope_theta(values: Mapping[str, Any]) -> float:
    """Base of the wavelengths, from `rope_parameters` (transformers 5) or the older keys."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type ({kind!r}) is not supported; this model needs 'default'")
    return rope.get("rope_theta", values.get("rope_theta", 10000.0))


def _plain_names(config: ModelConfig) -> dict[str, str]:
    """Our name to theirs, of every tensor but the experts and the biases of routers."""
    names = dict(_TOP)
    for layer in range(config.num_layers):
        for ours, theirs in _LAYER.items():
            names[f"blocks.{layer}.{ours}"] = f"model.layers.{layer}.{theirs}"
    return names


def state_dict_from_hf(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Rename an OLMoE model's tensors to ours, from either layout of the experts.

    Args:
        state: their tensors by name; gradients by name do as well.
        config: of `config_from_hf`.
    Returns:
        A state dict for `MoETransformer(config)`; router biases, which OLMoE has not, are 0.
    Raises:
        ValueError: if a tensor is missing, or one is left over.
    """
    left = dict(state)

    def take(name: str) -> Tensor:
        if name not in left:
            raise ValueError(f"the OLMoE weights have no tensor {name}")
        return left.pop(name)

    out: dict[str, Tensor] = {}
    for ours, theirs in _plain_names(config).items():
        # Files of tied models hold the table once.
        if ours == "head.weight" and config.tie_embeddings and theirs not in left:
            out[ours] = out["embedding.weight"]
        else:
            out[ours] = take(theirs)
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}.feed_forward", f"model.layers.{layer}.mlp.experts"
        if f"{theirs}.gate_up_proj" in left:
            gate, up = take(f"{theirs}.gate_up_proj").chunk(2, dim=1)  # (E, F, D) each
            stacked = {"w1": gate, "w3": up, "w2": take(f"{theirs}.down_proj")}
        else:
            stacked = {
                w: torch.stack(
                    [take(f"{theirs}.{e}.{name}.weight") for e in range(config.moe.num_experts)]
                )
                for w, name in _EXPERT.items()
            }
        for w, tensor in stacked.items():
            out[f"{ours}.experts.{w}"] = tensor.contiguous()
        out[f"{ours}.router.expert_bias"] = torch.zeros(
            config.moe.num_experts, device=out[f"{ours}.router.weight"].device
        )
    if left:
        raise ValueError(f"the OLMoE weights have tensors of no place here: {', '.join(left)}")
    return out


def state_dict_to_hf(
    state: Mapping[str, Tensor], config: ModelConfig, *, fused: bool = True
) -> dict[str, Tensor]:
    """Rename our tensors to those of an OLMoE model.

    Args:
        state: `MoETransformer(config).state_dict()`.
        config: of the model; must describe what OLMoE has.
        fused: experts as in memory (`gate_up_proj`, `down_proj`), or one matrix an expert as in
            files.
    Raises:
        ValueError: if OLMoE has no place for a part of the model, a router's bias included.
    """
    check_is_olmoe(config)
    left = dict(state)
    out = {theirs: left.pop(ours) for ours, theirs in _plain_names(config).items()}
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}.feed_forward", f"model.layers.{layer}.mlp.experts"
        bias = left.pop(f"{ours}.router.expert_bias")
        if torch.count_nonzero(bias):
            raise ValueError(
                f"{ours}.router.expert_bias is not 0, and OLMoE has no place for it: the model "
                f"would choose other experts there"
            )
        experts = {w: left.pop(f"{ours}.experts.{w}") for w in _EXPERT}
        if fused:
            out[f"{theirs}.gate_up_proj"] = torch.cat([experts["w1"], experts["w3"]], dim=1)
            out[f"{theirs}.down_proj"] = experts["w2"]
            continue
        for w, name in _EXPERT.items():
            for e, matrix in enumerate(experts[w].unbind(0)):
                # A copy: files refuse tensors that share memory.
                out[f"{theirs}.{e}.{name}.weight"] = matrix.clone()
    if left:
        raise ValueError(f"OLMoE has no place for {', '.join(left)}")
    return out


def check_is_olmoe(config: ModelConfig) -> None:
    """ValueError, naming the setting, if a model has what OLMoE cannot say."""
    needed: dict[str, tuple[Any, Any]] = {
        "attention.qk_norm": (config.attention.qk_norm, "projection"),
        "attention.window": (config.attention.window, None),
        "head_dim": (config.head_dim * config.attention.num_heads, config.hidden_size),
        "moe.num_shared_experts": (config.moe.num_shared_experts, 0),
        "moe.num_choices": (config.moe.num_choices, config.moe.num_experts),
        "moe.eval_capacity_factor": (config.moe.eval_capacity_factor, None),
        "moe.shared_gate": (config.moe.shared_gate, "none"),
        "moe.latent_size": (config.moe.latent_size, None),
        "moe.router.name": (config.moe.router.name, "topk"),
        "moe.router.score": (getattr(config.moe.router, "score", None), "softmax"),
        "moe.router.scale": (getattr(config.moe.router, "scale", 1.0), 1.0),
        "moe.router.num_groups": (getattr(config.moe.router, "num_groups", None), None),
        "moe.experts.name": (config.moe.experts.name, "swiglu"),
        "moe.experts.clamp": (getattr(config.moe.experts, "clamp", None), None),
        "moe.layers": (config.moe.layers, ()),
        "routed layers": (len(config.moe_layers), config.num_layers),
    }
    for name, (found, wanted) in needed.items():
        if found != wanted:
            raise ValueError(f"model.{name} ({found}) must be {wanted} in an OLMoE model")
