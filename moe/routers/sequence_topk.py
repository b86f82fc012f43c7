"""Sequence top-k: a sequence has experts for K a token, and gives them to its tokens by score.

    probs = softmax(W x), sigmoid(W x) or sqrt(softplus(W x))
    each document of n valid tokens keeps the round(n * experts_per_token), at least 1, largest of
    its (token, expert) probs, ties to the first token; at most the best `top_k` of a token compete
    topk_weights = the probs that were kept, divided by their sum over the token if `normalize`

Hard tokens get more experts, easy ones fewer or none, at the FLOPs of top-k. Documents that are
packed into one sequence have budgets of their own (the paper has one document to a sequence). A
Routing has `top_k` columns, a token's experts in falling order, then -1. In generation with a cache
one token is the document, so each gets `experts_per_token`; the paper's online variant, which
carries the budget along, is not here.

Not causal: a later token with high scores takes the experts of an earlier one. Sources: Wen et al.,
Route Experts by Sequence, Not by Token, arXiv 2511.06494; the limit for each token: NVIDIA's
Megatron-LM, pull request 6208.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from kernels.routing import lowest_index_topk, score_of
from moe.router import ChoosingRouter, Score, refuse_constant_weight
from moe.routing import RouterContext, rank_in_group
from moe.variants import Count, Real, VariantConfig

EXAMPLES = (
    {"experts_per_token": 1.5, "top_k": 3},
    {"score": "sigmoid", "normalize": True},
)


class Config(VariantConfig):
    """experts_per_token: the mean over the tokens of a document, with a fraction if wanted; top_k:
    the most that one token may have, None for all E."""

    name: Literal["sequence_topk"] = "sequence_topk"
    experts_per_token: Annotated[Real, Field(gt=0)] = 2.0
    top_k: Count | None = None
    score: Score = "softmax"
    normalize: bool = False

    @model_validator(mode="after")
    def _settings_have_an_effect(self):
        if self.top_k is not None and self.experts_per_token > self.top_k:
            raise ValueError(
                f"experts_per_token ({self.experts_per_token:g}) must not exceed top_k "
                f"({self.top_k}), the most that one token may have"
            )
        refuse_constant_weight(self.top_k, self.normalize)
        return self

    def check_experts(self, num_experts: int) -> None:
        """ValueError if tokens would need more experts than there are."""
        if self.experts_per_token > num_experts:
            raise ValueError(
                f"model.moe.router.experts_per_token ({self.experts_per_token:g}) must not exceed "
                f"model.moe.num_experts ({num_experts})"
            )


class Router(ChoosingRouter):
    """(T, D) -> Routing with `top_k` columns. In float32 always."""

    causal = False
    independent = False
    fixed_k = False

    def choose(self, router_logits: Tensor, context: RouterContext) -> Tensor:
        config = self.config
        indices = lowest_index_topk(router_logits, config.top_k or self.num_experts)  # (T, K)
        scores = score_of(router_logits, config.score).gather(-1, indices)
        kept = _keep(scores, _documents(context, scores.device), context.valid, config)
        return indices.masked_fill(~kept, -1)


def _documents(context: RouterContext, device: torch.device) -> Tensor:
    """(T,) int64, a number for each document of each sequence."""
    num_sequences, seq_len = context.batch_shape
    sequence = torch.arange(num_sequences, device=device).repeat_interleave(
        seq_len, output_size=num_sequences * seq_len
    )
    if context.document_ids is None:
        return sequence
    # Ids are unique within a sequence only.
    return (sequence << 32) + context.document_ids


def _keep(scores: Tensor, documents: Tensor, valid: Tensor | None, config: Config) -> Tensor:
    """(T, K) bool, the largest of each document's (T, K) scores; without a value on the host."""
    counted = torch.ones_like(documents) if valid is None else valid.long()
    if valid is not None:
        scores = scores.masked_fill(~valid.unsqueeze(-1), -torch.inf)
    of = documents.unsqueeze(-1).expand_as(scores).reshape(-1)  # (T * K,)
    ranks = rank_in_group(of, scores.reshape(-1).sort(descending=True, stable=True).indices)
    # The slot of a document's count is its first place among all, sorted.
    slots = torch.searchsorted(documents.sort().values, documents)  # (T,)
    counts = torch.zeros_like(documents).index_add_(0, slots, counted)
    budgets = (counts.double() * config.experts_per_token).round().long().clamp(min=1)
    return ranks.view_as(scores) < budgets[slots].unsqueeze(-1)
