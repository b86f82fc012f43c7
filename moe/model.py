"""The language model: token embedding, pre-norm blocks of attention and feed-forward, head.

x = embedding[input_ids]                                  (B, S, D)
for each block:  x = x + attention(norm(x));  x = x + feed_forward(norm(x))
lm_loss = cross_entropy(norm(x) @ head^T, labels);  loss = lm_loss + sum of weight * aux
"""

import contextlib
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.cross_entropy import LinearCrossEntropy, linear_cross_entropy
from kernels.matmul import linear
from moe.attention import CausalSelfAttention, KVCache
from moe.config import ModelConfig
from moe.layer import DenseFeedForward, MoELayer, init_feed_forward
from moe.losses import LossContext
from moe.modules import RMSNorm
from moe.routing import RouterContext, Routing, stack_layers
from moe.variants import load_variant


class BatchTotals(NamedTuple):
    """Facts of the whole optimizer step, over all ranks and accumulation steps.

    With them, the losses of the step's forward passes add up to the loss of the whole batch.
    num_labels (), labels that count; num_tokens () valid tokens; tokens_per_expert (L, E) that the
    router of each routed layer asked for (before a capacity), or None for the counts of each pass
    itself, to which counts_so_far (L, E) of the earlier passes are added where given, and which
    sum_over_ranks sums where given.
    """

    num_labels: Tensor
    num_tokens: Tensor
    tokens_per_expert: Tensor | None = None
    counts_so_far: Tensor | None = None
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None


class ModelOutput(NamedTuple):
    """What a forward pass returns; None where it was not asked for.

    loss () to differentiate; lm_loss () nats per token of this pass; lm_z_loss () the mean squared
    logsumexp of the head, if `model.lm_z_loss_weight` is set; num_labels () counted labels;
    aux_losses () each, in the order of `model.moe.losses`, unweighted, mean over layers, and the
    routers' own penalty behind them where they have one; aux_share
    () this pass's share of the step's tokens, and aux_coefficients () each, what each of the losses
    was multiplied by in `loss`; lm_z_coefficient () the same of lm_z_loss;
    logits (B, S, V); routings, one a routed layer; caches, one a block.
    """

    loss: Tensor | None
    lm_loss: Tensor | None
    lm_z_loss: Tensor | None
    num_labels: Tensor | None
    aux_losses: tuple[Tensor, ...]
    logits: Tensor | None
    routings: tuple[Routing, ...]
    caches: tuple[KVCache, ...]
    aux_share: Tensor | None = None
    aux_coefficients: tuple[Tensor, ...] = ()
    lm_z_coefficient: Tensor | None = None


class TransformerBlock(nn.Module):
    """(B, S, D) -> (B, S, D), with the Routing where its feed-forward is routed."""

    def __init__(self, config: ModelConfig, layer: int, moe_layer: type[MoELayer]):
        super().__init__()
        norm = config.hidden_size, config.norm_eps, config.kernel_backend
        self.attention_norm = RMSNorm(*norm)
        self.attention = CausalSelfAttention(config)
        self.feed_forward_norm = RMSNorm(*norm)
        self.feed_forward: nn.Module
        if config.is_moe_layer(layer):
            self.feed_forward = moe_layer(config.at(layer))
        else:
            self.feed_forward = DenseFeedForward(config, config.dense_intermediate_size)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        context: RouterContext,
        document_ids: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Routing | None, KVCache]:
        attended, cache = self.attention(self.attention_norm(x), positions, document_ids, cache)
        x = x + attended
        flat = self.feed_forward_norm(x).flatten(0, 1)  # (T, D)
        routing = None
        if isinstance(self.feed_forward, MoELayer):
            flat, routing = self.feed_forward(flat, context)
        else:
            flat = self.feed_forward(flat)
        return x + flat.view_as(x), routing, cache


class Head(nn.Module):
    """The language-model head, weight (V, D): logits, or the loss without ever holding them.

    The one place that reads its weight, by a call of the module: sharding engines gather parameters
    in hooks of that call.
    """

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.z_loss_weight, self.backend = config.lm_z_loss_weight, config.kernel_backend
        self.weight: Tensor = nn.Parameter(torch.empty(vocab_size, config.hidden_size))

    def forward(
        self, x: Tensor, labels: Tensor | None = None, *, need_logits: bool = True
    ) -> tuple[Tensor | None, LinearCrossEntropy | None]:
        """Logits (B, S, V) of x (B, S, D) if needed, and the loss of labels (B, S) if given."""
        logits = linear(x, self.weight) if need_logits else None
        if labels is None:
            return logits, None
        loss = linear_cross_entropy(
            x.flatten(0, 1),
            self.weight,
            labels.flatten(),
            z_loss_weight=self.z_loss_weight,
            backend=self.backend,
        )
        return logits, loss


class MoETransformer(nn.Module):
    """The whole model. Builds on any device, `meta` included; `init_weights` fills it."""

    def __init__(self, config: ModelConfig, *, moe_layer: type[MoELayer] = MoELayer):
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size (None) must be set, by the tokenizer or by hand")
        self.config = config
        self.activation_checkpointing = False
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(
            TransformerBlock(config, layer, moe_layer) for layer in range(config.num_layers)
        )
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps, config.kernel_backend)
        self.head = Head(config, config.vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def transformer_blocks(self) -> list[TransformerBlock]:
        """The blocks from the bottom up."""
        return [block for block in self.blocks if isinstance(block, TransformerBlock)]

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        *,
        valid: Tensor | None = None,
        totals: BatchTotals | None = None,
        caches: tuple[KVCache, ...] | None = None,
        need_logits: bool | None = None,
        generator: torch.Generator | None = None,
        routes: Sequence[Tensor | None] | None = None,
        noise_seeds: Tensor | None = None,
    ) -> ModelOutput:
        """Args:
        input_ids: (B, S) int64. labels: (B, S), -100 where nothing is to be predicted.
        document_ids: (B, S), or (B, S_past + S) with caches: attention stays within equal ids of a
            row; None: one document.
        valid: (B, S) bool, False for padding; None: no padding.
        totals: of the optimizer step, where this pass is a part of it.
        caches: one a block, from an earlier call on the same sequences' beginning.
        need_logits: whether to return them, by default where there are no labels.
        generator: of the router's noise; None for PyTorch's global one, which alone activation
            checkpointing replays.
        routes: one a routed layer, (B, S, K) experts to take in place of the router's choice, -1
            for none, or None for its own choice there; None: every router chooses.
        noise_seeds: (B,) int64 on the CPU, of the routers' noise in each sequence, in place of a
            generator: the same however a batch is split, and whatever is recomputed.

        Raises:
            ValueError: on a generator under activation checkpointing: the recomputation would draw
                other noise, and the gradient be that of another routing; on one beside noise_seeds;
                on routes of another shape, or for a router that cannot take them.
        """
        if generator is not None and noise_seeds is not None:
            raise ValueError("generator must be None where noise_seeds say what noise is drawn")
        if generator is not None and self.activation_checkpointing and torch.is_grad_enabled():
            raise ValueError(
                "generator must be None under activation checkpointing, which replays PyTorch's "
                "global stream only"
            )
        past = caches[0].keys.shape[1] if caches else 0
        positions = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
        context = RouterContext(
            token_ids=input_ids.flatten(),
            # With caches, `document_ids` begin with those of the cached tokens.
            document_ids=None if document_ids is None else document_ids[:, past:].flatten(),
            valid=None if valid is None else valid.flatten(),
            batch_shape=(input_ids.shape[0], input_ids.shape[1]),
            training=self.training,
            generator=generator,
            backend=self.config.kernel_backend,
            noise_seeds=noise_seeds,
        )
        x = self.embedding(input_ids)  # (B, S, D)
        x, routings, new_caches = self._run_blocks(
            x,
            positions,
            self._layer_contexts(context, routes),
            document_ids,
            caches,
            keep_caches=labels is None,
        )
        if need_logits is None:
            need_logits = labels is None
        logits, lm = self.head(self.final_norm(x), labels, need_logits=need_logits)
        aux_losses = self._aux_losses(routings, context, totals)
        output = ModelOutput(None, None, None, None, aux_losses, logits, routings, new_caches)
        return output if lm is None else self._with_loss(output, lm, totals)

    def _layer_contexts(
        self, context: RouterContext, routes: Sequence[Tensor | None] | None
    ) -> list[RouterContext]:
        """The context of each block: its number, and the routes that its router is to take."""
        contexts = [context._replace(layer=layer) for layer in range(len(self.blocks))]
        if routes is None:
            return contexts
        config = self.config
        if len(routes) != len(config.moe_layers):
            raise ValueError(
                f"routes has {len(routes)} layers, needs {len(config.moe_layers)}, one for each "
                f"routed layer of the model"
            )
        for layer, chosen in zip(config.moe_layers, routes, strict=True):
            if chosen is None:
                continue
            name = config.at(layer).moe.router.name
            if not load_variant("routers", name).Router.replays:
                raise ValueError(
                    f"{config.setting('router', layer)}.name ({name}) cannot replay routes: its "
                    f"Router does not say `replays = True`"
                )
            wanted = *context.batch_shape, config.at(layer).top_k
            if tuple(chosen.shape) != wanted:
                raise ValueError(
                    f"routes of layer {layer} are {tuple(chosen.shape)}, need {wanted} (B, S, K)"
                )
            contexts[layer] = contexts[layer]._replace(topk_indices=chosen.flatten(0, 1).long())
        return contexts

    def _run_blocks(
        self,
        x: Tensor,
        positions: Tensor,
        contexts: list[RouterContext],
        document_ids: Tensor | None,
        caches: tuple[KVCache, ...] | None,
        *,
        keep_caches: bool,
    ) -> tuple[Tensor, tuple[Routing, ...], tuple[KVCache, ...]]:
        """All blocks, recomputed in the backward pass under activation checkpointing."""
        routings, new_caches = [], []
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            cache = caches[layer] if caches else None
            arguments = (x, positions, contexts[layer], document_ids, cache)
            if recompute:
                x, routing, cache = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x, routing, cache = block(*arguments)
            if routing is not None:
                routings.append(routing)
            # In training they would outlive the block, and undo what recomputation saves.
            if keep_caches:
                new_caches.append(cache)
        return x, tuple(routings), tuple(new_caches)

    def _aux_losses(
        self, routings: tuple[Routing, ...], context: RouterContext, totals: BatchTotals | None
    ) -> tuple[Tensor, ...]:
        """Each configured loss, the mean over routed layers."""
        if not routings:
            return ()
        counts = None if totals is None else totals.tokens_per_expert  # (L, E)
        losses: Any = self.config.moe.losses
        read = any(loss.reads_batch_counts for loss in losses)
        if totals is not None and counts is None and read:
            counts = stack_layers([routing.demand for routing in routings])
            if totals.counts_so_far is not None:
                counts = counts + totals.counts_so_far
            if totals.sum_over_ranks is not None:
                counts = totals.sum_over_ranks(counts)
        loads: list[Tensor | None] = [None] * len(routings)
        if counts is not None:
            loads = [
                load[: len(routing.demand)] for load, routing in zip(counts, routings, strict=True)
            ]
        values = []
        for config in self.config.moe.losses:
            compute = load_variant("losses", config.name).loss
            per_layer = [
                compute(config, routing, LossContext(context._replace(layer=layer), load))
                for layer, routing, load in zip(
                    self.config.moe_layers, routings, loads, strict=True
                )
            ]
            values.append(torch.stack(per_layer).mean())
        penalties = [routing.penalty for routing in routings]
        found = [penalty for penalty in penalties if penalty is not None]
        if found:
            none = torch.zeros_like(found[0])
            each = [none if penalty is None else penalty for penalty in penalties]
            values.append(torch.stack(each).mean())
        return tuple(values)

    def _with_loss(
        self, output: ModelOutput, lm: LinearCrossEntropy, totals: BatchTotals | None
    ) -> ModelOutput:
        """Add the losses; with totals, `loss` is this pass's share of the step's."""
        loss = lm.loss
        lm_share = aux_share = torch.ones_like(loss)
        if totals is not None:
            # At least 1: a step may have no label at all. A quotient of integers would be float32.
            lm_share = lm.num_tokens.to(loss.dtype) / totals.num_labels.clamp(min=1)
            loss = loss * lm_share
            if output.routings:
                num_tokens = output.routings[0].num_tokens.to(loss.dtype)
                aux_share = num_tokens / totals.num_tokens.clamp(min=1)
        coefficients = []
        weights = [config.weight for config in self.config.moe.losses]  # type: ignore[attr-defined]
        # A router's own penalty, the last one where there is one, is weighted already.
        for weight, value in zip([*weights, 1.0], output.aux_losses, strict=False):
            coefficients.append(weight * aux_share)
            if weight:
                loss = loss + coefficients[-1] * value
        z_weight = self.config.lm_z_loss_weight
        return output._replace(
            loss=loss,
            lm_loss=(lm.loss - lm.z_loss).detach(),
            lm_z_loss=lm.z_loss / z_weight if z_weight else None,
            num_labels=lm.num_tokens,
            aux_share=aux_share,
            aux_coefficients=tuple(coefficients),
            lm_z_coefficient=z_weight * lm_share if z_weight else None,
        )


def init_weights(
    model: MoETransformer,
    seed: int,
    gathered: Callable[[nn.Module], contextlib.AbstractContextManager[Any]] = (
        contextlib.nullcontext
    ),
) -> None:
    """Fill every parameter; each from a stream of its own, named by parameter and global expert id.

    So a model's weights depend neither on the order of construction nor on the ranks that hold its
    experts. Normal of init_std; projections into the residual stream divided by sqrt(2 * layers),
    which keeps its variance from growing with depth (GPT-2). Norm weights are 1, router biases 0.

    Args: gathered: a block of code in which the parameters of a module are whole.
    """
    config = model.config
    std = config.init_std
    out_std = std / math.sqrt(2 * config.num_layers)

    device = model.embedding.weight.device

    def stream(name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        return torch.Generator(device).manual_seed(int.from_bytes(digest[:7]))

    with torch.no_grad():
        with gathered(model.embedding):
            model.embedding.weight.normal_(0, std, generator=stream("embedding"))
        if not config.tie_embeddings:
            with gathered(model.head):
                model.head.weight.normal_(0, std, generator=stream("head"))
        for layer, block in enumerate(model.transformer_blocks()):
            with gathered(block):
                for name in ("wq", "wk", "wv", "wo"):
                    scale = out_std if name == "wo" else std
                    getattr(block.attention, name).weight.normal_(
                        0, scale, generator=stream(f"{layer}.{name}")
                    )
                init_feed_forward(
                    block.feed_forward, std, out_std, lambda name, at=layer: stream(f"{at}.{name}")
                )
        for module in model.modules():
            if isinstance(module, RMSNorm):
                with gathered(module):
                    module.weight.fill_(1)
            if isinstance(bias := getattr(module, "expert_bias", None), Tensor):
                bias.zero_()


class ParameterCount(NamedTuple):
    """total; active: used by one token, embedding look-up left out; embedding: both tables;
    experts: routed ones, of all layers."""

    total: int
    active: int
    embedding: int
    experts: int


def num_parameters(model: MoETransformer) -> ParameterCount:
    """Count parameters of the whole model, those of experts in other processes included.

    A model on the meta device will do.
    """
    config = model.config
    total = active = sum(p.numel() for p in model.parameters())
    experts = 0
    table = model.embedding.weight.numel()
    if not config.tie_embeddings:
        active -= table
    for number, block in enumerate(model.transformer_blocks()):
        layer, here = block.feed_forward, config.at(number)
        if isinstance(layer, MoELayer):
            held = sum(p.numel() for p in layer.experts.parameters())
            expert = held // layer.num_local_experts
            experts += expert * here.moe.num_experts
            total += expert * here.moe.num_experts - held
            active += round(expert * here.experts_per_token) - held
    embedding = table if config.tie_embeddings else table + model.head.weight.numel()
    return ParameterCount(total, active, embedding, experts)


def flops_per_token(model: MoETransformer, seq_len: int) -> int:
    """Floating-point operations of one token in training (forward and backward).

    6 for each active matrix weight, and 6 * 2 * H * P for each key in reach, of which a causal
    sequence has (S + 1) / 2 on average (fewer with a window). Norms and softmax are left out.
    Source: PaLM, arXiv 2204.02311, appendix B, with the causal half.
    """
    config = model.config
    vectors = sum(m.weight.numel() for m in model.modules() if isinstance(m, RMSNorm))
    weights = num_parameters(model).active - vectors
    window = min(config.attention.window or seq_len, seq_len)
    keys = (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
    attention = config.num_layers * 2 * config.attention.num_heads * config.head_dim * keys
    return int(6 * (weights + attention))
