"""What is a model made of? The frozen schema of `model:` in a run's YAML, and its checks.

Defaults live here alone; a YAML lists only what differs from them.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from moe.variants import ExpertsConfig, LossConfig, RouterConfig


def _whole_number(value: Any) -> Any:
    """Accept `1e9` and `1_000` for integers; leave the rest to pydantic, but never a boolean."""
    if isinstance(value, bool):
        raise ValueError("needs a whole number")
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("needs a number")
    return value


Whole = Annotated[int, BeforeValidator(_whole_number)]
Count = Annotated[int, BeforeValidator(_whole_number), Field(ge=1)]
CountOrNone = Annotated[int, BeforeValidator(_whole_number), Field(ge=0)]
Real = Annotated[float, BeforeValidator(_number)]


class Section(BaseModel):
    """Base of every section: frozen, unknown keys forbidden."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class AttentionConfig(Section):
    """Grouped-query causal attention.

    head_dim defaults to hidden_size / num_heads. qk_norm: `none`, `head` (each head's vector, as in
    Qwen3) or `projection` (the whole projection before the split into heads, as in OLMoE).
    window: keys that a query sees, itself included; None sees the whole document.
    """

    num_heads: Count = 4
    num_kv_heads: Count | None = None
    head_dim: Count | None = None
    qk_norm: Literal["none", "head", "projection"] = "head"
    rope_theta: Annotated[Real, Field(gt=0)] = 10000.0
    window: Count | None = None


class MoEConfig(Section):
    """The routed feed-forward layer.

    intermediate_size: inner width of one expert. shared_intermediate_size: inner width of one shared
    expert, by default that of a routed one. layers: `all`, or `{every: n}` (layers n-1, 2n-1, ...),
    or `{first_dense: n}` (all after n dense ones). dense_intermediate_size: width of the dense
    feed-forward layers among them, by default of equal active FLOPs. capacity_factor (an expert's
    share of T*K/E): None is dropless, the only choice so far.
    """

    num_experts: Count = 8
    intermediate_size: Count = 256
    num_shared_experts: CountOrNone = 0
    shared_intermediate_size: Count | None = None
    every: Count = 1
    first_dense: CountOrNone = 0
    dense_intermediate_size: Count | None = None
    capacity_factor: None = None
    allow_non_causal: bool = False
    router: RouterConfig = Field(default={"name": "topk"}, validate_default=True)
    experts: ExpertsConfig = Field(default={"name": "swiglu"}, validate_default=True)
    losses: tuple[LossConfig, ...] = Field(
        default=({"name": "load_balancing"}, {"name": "router_z_loss"}), validate_default=True
    )


class ModelConfig(Section):
    """A pre-norm decoder-only transformer.

    feed_forward: `moe`, or `dense` for the baseline of equal active FLOPs (the one switch between
    the two). vocab_size None takes the tokenizer's, rounded up to a multiple of 64. init_std: of
    every matrix but the projections back into the residual stream, which are divided by
    sqrt(2 * num_layers). lm_z_loss_weight: on logsumexp(logits)^2 of the language-model head.
    """

    vocab_size: Count | None = None
    hidden_size: Count = 256
    num_layers: Count = 4
    norm_eps: Annotated[Real, Field(gt=0)] = 1e-5
    tie_embeddings: bool = False
    feed_forward: Literal["moe", "dense"] = "moe"
    init_std: Annotated[Real, Field(gt=0)] = 0.02
    lm_z_loss_weight: Annotated[Real, Field(ge=0)] = 0.0
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig = MoEConfig()
