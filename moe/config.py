"""What is a model made of? The frozen schema of `model:` in a run's YAML, and its checks.

Defaults live here alone; a YAML lists only what differs from them.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from moe.config_checks import check_attention, check_experts, check_layers
from moe.layer_overrides import LayerOverride
from moe.variants import (
    Count,
    ExpertsConfig,
    LossConfig,
    Natural,
    Real,
    RouterConfig,
    Section,
    load_variant,
)


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


# Numbers a token of each `shared_gate`.
SHARED_GATE_WIDTHS = {"none": 0, "sigmoid": 1, "softmax": 2}


class MoEConfig(Section):
    """The routed feed-forward layer.

    experts: their kind, which shared experts and dense layers share. intermediate_size: inner width
    of one expert. num_zero_experts, num_copy_experts and num_constant_experts: further choices,
    which cost nothing, see `moe.zero_computation`. shared_intermediate_size: inner width of one
    shared expert, by default that of a routed one. shared_gate: how the shared experts' sum s joins
    the routed experts' r: `none`, r + s; `sigmoid`, r + sigmoid(w x) s with w (1, D), as in
    Qwen2-MoE; `softmax`, c_0 r + c_1 s with c = softmax(W x), W (2, D): residual MoE,
    `use_residual` in DeepSpeed-MoE (arXiv 2201.05596), but without a bias beside W, as all linear
    layers here. latent_size: width l of what routed experts read and write, in place of
    hidden_size: one matrix D -> l before the dispatch and one l -> D after it, shared by all
    experts; router and shared experts see D (LatentMoE, arXiv 2601.18089); l = D, for comparison,
    has the matrices and saves nothing. num_dense_layers: that many layers at the bottom are dense;
    moe_layer_every: of the others, each n-th is routed (1: all) and the rest dense.
    dense_intermediate_size: inner width of a dense layer, by default that of equal active FLOPs.
    capacity_factor: an expert takes that many times the mean load at most, see `moe.capacity`; None
    is dropless. eval_capacity_factor: the same in evaluation and generation, whatever the former.
    drop_priority: which tokens an expert keeps, the first, the most probable or random ones.
    allow_non_causal: permit a router that sees later tokens. layers: where routed layers differ
    from each other.
    """

    num_experts: Count = 8
    intermediate_size: Count = 256
    num_shared_experts: Natural = 0
    shared_intermediate_size: Count | None = None
    shared_gate: Literal["none", "sigmoid", "softmax"] = "none"
    latent_size: Count | None = None
    moe_layer_every: Count = 1
    num_dense_layers: Natural = 0
    dense_intermediate_size: Count | None = None
    num_zero_experts: Natural = 0
    num_copy_experts: Natural = 0
    num_constant_experts: Natural = 0
    capacity_factor: Annotated[Real, Field(gt=0)] | None = None
    eval_capacity_factor: Annotated[Real, Field(gt=0)] | None = None
    drop_priority: Literal["position", "probability", "random"] = "position"
    allow_non_causal: bool = False
    router: RouterConfig = Field(default={"name": "topk"}, validate_default=True)
    experts: ExpertsConfig = Field(default={"name": "swiglu"}, validate_default=True)
    losses: tuple[LossConfig, ...] = Field(
        default=({"name": "load_balancing"}, {"name": "router_z_loss"}), validate_default=True
    )
    layers: tuple[LayerOverride, ...] = ()

    @property
    def num_choices(self) -> int:
        """What a router chooses among: experts, and those that cost nothing behind them."""
        return self.num_experts + sum(self.zero_computation)

    @property
    def drops(self) -> bool:
        """Whether there is a capacity, in training or in evaluation."""
        return self.capacity_factor is not None or self.eval_capacity_factor is not None

    @property
    def zero_computation(self) -> tuple[int, int, int]:
        """Numbers of zero, copy and constant experts."""
        return self.num_zero_experts, self.num_copy_experts, self.num_constant_experts


class ModelConfig(Section):
    """A pre-norm decoder-only transformer.

    feed_forward: `moe`, or `dense` for the baseline of equal active FLOPs (the one switch between
    the two). vocab_size None takes the tokenizer's, rounded up to a multiple of 64. init_std: of
    every matrix but the projections back into the residual stream, which are divided by
    sqrt(2 * num_layers). lm_z_loss_weight: on logsumexp(logits)^2 of the language-model head.
    kernel_backend: which kernels run, `auto` (Triton on a GPU, PyTorch on a CPU), `triton`, `torch`
    or `torch_compile` (PyTorch on a CPU, parts of it compiled at their first use).
    """

    vocab_size: Count | None = None
    hidden_size: Count = 256
    num_layers: Count = 4
    norm_eps: Annotated[Real, Field(gt=0)] = 1e-5
    tie_embeddings: bool = False
    feed_forward: Literal["moe", "dense"] = "moe"
    init_std: Annotated[Real, Field(gt=0)] = 0.02
    lm_z_loss_weight: Annotated[Real, Field(ge=0)] = 0.0
    kernel_backend: Literal["auto", "triton", "torch", "torch_compile"] = "auto"
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig = MoEConfig()

    @property
    def head_dim(self) -> int:
        """P."""
        return self.attention.head_dim or self.hidden_size // self.attention.num_heads

    @property
    def num_kv_heads(self) -> int:
        """G."""
        return self.attention.num_kv_heads or self.attention.num_heads

    @property
    def dense_intermediate_size(self) -> int:
        """Inner width of a dense layer; by default its FLOPs are the active ones of a routed layer.

        A layer of width F multiplies 3 D F weights a token, 2 D F without a gate; a routed layer
        multiplies those of its K (or mean number of) routed experts, of l in place of D with
        latent_size, its shared ones and the gate of these, the D E of its router, the 2 D l around
        latent experts and the 3 D of each constant expert. Where routed layers differ, the mean
        over them.
        """
        moe = self.moe
        if moe.dense_intermediate_size is not None:
            return moe.dense_intermediate_size
        if moe.layers:
            widths = [config.dense_intermediate_size for config in self._routed_configs]
            return round(sum(widths) / len(widths))
        shared = moe.num_shared_experts * self.shared_intermediate_size
        matrices = 3 if moe.experts.has_gate else 2
        routed = matrices * round(self.experts_per_token * moe.intermediate_size)
        # All by D, as the router's D E is E.
        others = moe.num_choices + 3 * moe.num_constant_experts
        others += 2 * (moe.latent_size or 0) + SHARED_GATE_WIDTHS[moe.shared_gate]
        routed_by_d = routed * self.expert_hidden_size / self.hidden_size
        return shared + round((routed_by_d + others) / matrices)

    @property
    def expert_hidden_size(self) -> int:
        """Width of what a routed expert reads and writes: D, or l of latent experts."""
        return self.moe.latent_size or self.hidden_size

    @property
    def shared_intermediate_size(self) -> int:
        """Inner width of one shared expert."""
        return self.moe.shared_intermediate_size or self.moe.intermediate_size

    @property
    def activate(self) -> Callable[..., Any]:
        """What stands between the matrices of shared experts and dense layers: as in experts."""
        experts: Any = self.moe.experts
        if not hasattr(experts, "activate"):
            raise ValueError(
                f"model.moe.experts.name ({experts.name}): its Config must have activate, which "
                f"shared experts and dense layers use too"
            )
        return experts.activate

    @property
    def top_k(self) -> int:
        """K, the router's; all its choices where it sets no bound; the largest of any layer."""
        if self.moe.layers:
            return max(config.top_k for config in self._routed_configs)
        if not hasattr(self.moe.router, "top_k"):
            raise ValueError(
                f"model.moe.router.name ({self.moe.router.name}): its Config must have top_k, the "
                f"number of columns of its Routing, or None for model.moe.num_experts"
            )
        top_k = self.moe.router.top_k
        return self.moe.num_choices if top_k is None else top_k

    @property
    def experts_per_token(self) -> float:
        """The mean over tokens: K, or what the router says where the number varies, or the most
        there can be where it cannot say. Experts that cost nothing do not count: with them, the
        mean where all choices are equally frequent. Where layers differ, the mean over them."""
        if self.moe.layers:
            means = [config.experts_per_token for config in self._routed_configs]
            return sum(means) / len(means)
        if not self.knows_experts_per_token:
            return min(self.top_k, self.moe.num_experts)
        return self.choices_per_token * self.moe.num_experts / self.moe.num_choices

    @property
    def choices_per_token(self) -> float:
        """The same, with experts that cost nothing; of one layer, see `at`."""
        mean = getattr(self.moe.router, "experts_per_token", None)
        return self.top_k if mean is None else mean

    @property
    def knows_experts_per_token(self) -> bool:
        """False where a router lets their number vary and cannot say its mean."""
        routers: list[Any] = [config.moe.router for config in self._routed_configs]
        varying = [each for each in routers if hasattr(each, "experts_per_token")]
        return all(each.experts_per_token is not None for each in varying)

    @property
    def causal(self) -> bool:
        """Whether no token's experts depend on later tokens, in training too."""
        if not self.moe_layers:
            return True
        drops_by_position = not self.moe.drops or self.moe.drop_priority == "position"
        return drops_by_position and all(config.router_causal for config in self._routed_configs)

    @property
    def router_causal(self) -> bool:
        """The same of the routers alone; of one layer, see `at`."""
        router = self.moe.router
        return load_variant("routers", router.name).Router.causal and router.causal

    @property
    def num_choices(self) -> int:
        """What a router chooses among: E and the experts that cost nothing; the most of any
        layer."""
        return max(config.moe.num_choices for config in self._routed_configs)

    @property
    def choices_of_layers(self) -> tuple[int, ...]:
        """What the router of each routed layer chooses among."""
        return tuple(self.at(layer).moe.num_choices for layer in self.moe_layers)

    @property
    def experts_of_layers(self) -> tuple[int, ...]:
        """E of each routed layer."""
        return tuple(self.at(layer).moe.num_experts for layer in self.moe_layers)

    @property
    def top_k_of_layers(self) -> tuple[int, ...]:
        """K of each routed layer."""
        return tuple(self.at(layer).top_k for layer in self.moe_layers)

    def at(self, layer: int) -> "ModelConfig":
        """The config with `moe` as the routed block number `layer` has it: what that block is built
        from, and asked where layers may differ. This very one where they do not."""
        if not self.moe.layers or not self._is_routed(layer):
            return self
        override = self._override(layer)
        settings = {} if override is None else self.moe.layers[override].settings
        return self._with_moe(**settings, layers=())

    @property
    def without_overrides(self) -> "ModelConfig":
        """The config as it holds where `moe.layers` says nothing."""
        return self._with_moe(layers=())

    def _with_moe(self, **settings: Any) -> "ModelConfig":
        return self.model_copy(update={"moe": self.moe.model_copy(update=settings)})

    def setting(self, name: str, layer: int) -> str:
        """Where the config says `name` (such as num_experts) of the routed block number `layer`."""
        override = self._override(layer)
        if override is None or name not in self.moe.layers[override].settings:
            return f"model.moe.{name}"
        return f"model.moe.layers.{override}.{name}"

    def _override(self, layer: int) -> int | None:
        """Place in `moe.layers` of what a block has for itself."""
        places = (place for place, each in enumerate(self.moe.layers) if layer in each.layers)
        return next(places, None)

    @property
    def _routed_configs(self) -> tuple["ModelConfig", ...]:
        """`at` of each layer that is routed, or is not as `feed_forward` is dense; this config
        alone where layers do not differ."""
        if not self.moe.layers:
            return (self,)
        return tuple(self.at(layer) for layer in self.routed_blocks)

    @property
    def routed_blocks(self) -> tuple[int, ...]:
        """`moe_layers`, also where nothing is routed as `feed_forward` is dense."""
        return tuple(layer for layer in range(self.num_layers) if self._is_routed(layer))

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block number `layer`, from 0, has routed experts."""
        return self.feed_forward == "moe" and self._is_routed(layer)

    def _is_routed(self, layer: int) -> bool:
        above = layer - self.moe.num_dense_layers
        return above >= 0 and (above + 1) % self.moe.moe_layer_every == 0

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the blocks with routed experts."""
        return tuple(layer for layer in range(self.num_layers) if self.is_moe_layer(layer))

    @model_validator(mode="after")
    def _settings_fit(self):
        check_attention(self)
        check_experts(self)
        check_layers(self)
        return self


def dense_equivalent(config: ModelConfig) -> ModelConfig:
    """The dense baseline of `config`: the same model without experts, at equal active FLOPs.

    Where `model.moe.dense_intermediate_size` gives the model's dense layers a width of their own,
    the baseline's width is the mean of that and the routed layers' equivalent.
    """
    moe = config.moe
    if moe.dense_intermediate_size is not None and config.feed_forward == "moe":
        by_itself = moe.model_copy(update={"dense_intermediate_size": None})
        routed = config.model_copy(update={"moe": by_itself}).dense_intermediate_size
        num_routed = len(config.moe_layers)
        width = num_routed * routed + (config.num_layers - num_routed) * moe.dense_intermediate_size
        moe = moe.model_copy(
            update={"dense_intermediate_size": max(1, round(width / config.num_layers))}
        )
    return config.model_copy(update={"feed_forward": "dense", "moe": moe})
