"""Token rounding: in training, top-k with each expert's number of tokens rounded to whole tiles.

    scores = softmax(W x) or sigmoid(W x)
    each token chooses its K best experts; expert e has c_e tokens, r_e = c_e mod tile beyond whole
    tiles, and is rounded up if 2 r_e >= tile (`nearest`), if r_e > 0 (`up`) or never (`down`)
    up: it takes the tile - r_e tokens that score it highest of those that did not choose it
    down: it loses the r_e of its tokens that score it lowest
    topk_weights = scores at a token's experts, divided by their sum if `normalize`

A grouped matmul cuts each expert's rows into tiles and pads the last: here no tile is padded, if
`tile` is the BLOCK_M of the kernels (in bfloat16 64 up to that many rows an expert, else 128). A
count moves by less than a tile, which is much where there are few: take at most T K / E, better
half. Under a Zipf load (8192 tokens, 2 of 64 experts, tiles of 128, mean of five draws) top-k needs
178 tiles, 28 % of their rows padded, and `nearest` 124; but 47 experts have no token then, not 1.

Three things differ from the paper. A Routing has fixed columns, K + 1, so a token is taken by one
further expert at most: where several want it, it goes to the one that it scores highest, and the
others ask their next token, for a fixed number of rounds (deferred acceptance, Gale and Shapley).
An expert that lacks even one token in the end is rounded down instead. And as experts compete in
vain for the last free tokens, rounding up is planned for three quarters of all tokens at most, of
the experts that lack least first: it matters where K is large and tiles are few, as `nearest` wants
E / 2 times tile / 4 further assignments or so. (The authors' program ranks the tokens of an expert
by normalised weights before rounding down, here they are ranked by scores.)

Small batches: a tile is halved until there are as many valid tokens. Where no expert has a whole
tile of tokens, the fullest is rounded up before all others, by `down` too: some tokens are left
without an expert, never all. Columns: a token's K experts in falling order, -1 where it was lost,
then the further one or -1. Counts are those of one forward pass on one rank; a capacity factor cuts
into them afterwards.

Not causal: in training a token's experts depend on later ones; evaluation is plain top-k and
causal. Source: Guo et al., SonicMoE, arXiv 2512.14080, token rounding.
"""

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from kernels.routing import lowest_index_topk, score_of
from moe.router import ChoosingRouter, refuse_constant_weight
from moe.routing import RouterContext
from moe.variants import Count, VariantConfig

# Of 8192 tokens with 8 of 512 experts, 244 wish to round up by 128. Planned for all tokens, 141 are
# full after 16 rounds and 190 after 64; for three quarters, 173 and 186; for half, 147 and 147.
ROUNDS = 16
PLANNED_SHARE = 0.75

EXAMPLES = (
    {"experts_per_token": 3, "tile": 4, "score": "sigmoid"},
    {"experts_per_token": 1, "tile": 5, "normalize": False, "rounding": "up"},
    {"tile": 4, "rounding": "down"},
)


class Config(VariantConfig):
    """experts_per_token that a token chooses, the K of evaluation; tile: tokens of an expert are a
    multiple of it; score that weighs them; rounding of an expert's tokens."""

    name: Literal["token_rounding"] = "token_rounding"
    experts_per_token: Count = 2
    tile: Count = 128
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    rounding: Literal["nearest", "up", "down"] = "nearest"

    @property
    def top_k(self) -> int:
        """Columns of the Routing."""
        return self.experts_per_token + 1

    @model_validator(mode="after")
    def _settings_have_an_effect(self):
        refuse_constant_weight(self.experts_per_token, self.normalize, "experts_per_token")
        if self.tile == 1:
            raise ValueError("tile (1) rounds nothing; take the kernels' tile, or name: topk")
        return self

    def check_experts(self, num_experts: int) -> None:
        """ValueError if a token's experts leave none to take it further."""
        if self.experts_per_token >= num_experts:
            raise ValueError(
                f"model.moe.router.experts_per_token ({self.experts_per_token}) must be below "
                f"model.moe.num_experts ({num_experts}): rounding up gives a token one more"
            )


class Router(ChoosingRouter):
    """(T, D) -> Routing with experts_per_token + 1 columns. In float32 always."""

    causal = False
    independent = False
    divisible = False
    fixed_k = False

    def choose(self, router_logits: Tensor, context: RouterContext) -> Tensor:
        config = self.config
        own = lowest_index_topk(router_logits, min(config.experts_per_token, self.num_experts))
        further = torch.full_like(own[:, :1], -1)
        if context.training:
            scores = score_of(router_logits, config.score)
            own, further = _round(scores, own, context.valid, config.tile, config.rounding)
        return torch.cat([own, further], dim=-1)  # (T, K + 1)


def _round(
    scores: Tensor, own: Tensor, valid: Tensor | None, tile: int, rounding: str
) -> tuple[Tensor, Tensor]:
    """(T, K) own experts, -1 where lost, and (T, 1) the further one or -1; without a value on the
    host. Padding may be given experts, and plays no part."""
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, own, True)  # (T, E)
    others = ~chosen
    if valid is not None:
        chosen, others = chosen & valid.unsqueeze(-1), others & valid.unsqueeze(-1)
        scores = scores.masked_fill(~valid.unsqueeze(-1), 0)
    counts = chosen.sum(0)  # (E,)
    num_valid = (chosen | others)[:, 0].sum()
    sizes = tile >> torch.arange(tile.bit_length(), device=own.device)
    rows = torch.where(sizes <= num_valid, sizes, 1).max()
    rest = counts % rows
    wanted, first = _plan(scores.sum(0), counts, rest, rows, num_valid, rounding)
    ranks = _ranks(scores, chosen, others)
    taken = _take(scores.masked_fill(first, torch.inf), others, ranks, wanted)
    up = (taken.sum(0) == wanted) & (wanted > 0)
    kept = chosen & (ranks < torch.where(up, counts, counts - rest))
    taken = taken & up
    further = torch.where(taken.any(-1), taken.int().argmax(-1), -1)
    return own.masked_fill(~kept.gather(1, own), -1), further.unsqueeze(-1)


def _plan(
    popularity: Tensor, counts: Tensor, rest: Tensor, rows: Tensor, num_valid: Tensor, rounding: str
) -> tuple[Tensor, Tensor]:
    """(E,) further tokens that each expert wants, 0 to be rounded down; and (E,) bool, True for the
    one expert, if any, whose wish comes first. popularity: (E,), the sum of its scores."""
    lacking = rows - rest
    # The rest from which on an expert goes up; none is that of a whole tile.
    least: dict[str, Tensor | int] = {"nearest": (rows + 1) // 2, "up": 1, "down": rows}
    fits = (rest >= least[rounding]) & (lacking <= num_valid - counts)
    wanted = torch.where(fits, lacking, 0)
    # By what they lack; of equals the more popular first, as the order of experts says nothing.
    order = popularity.sort(descending=True, stable=True).indices
    order = order[wanted[order].sort(stable=True).indices]
    planned = wanted[order].cumsum(0) <= PLANNED_SHARE * num_valid
    wanted = wanted.masked_fill(~torch.zeros_like(fits).scatter_(0, order, planned), 0)
    # The same two keys: most tokens, then most popular.
    fullest = order[counts[order].argmax(0, keepdim=True)]  # (1,)
    nobody_full = (counts < rows).all()
    first = nobody_full & (torch.arange(len(counts), device=counts.device) == fullest)
    return torch.where(first, lacking, wanted), first


def _ranks(scores: Tensor, chosen: Tensor, others: Tensor) -> Tensor:
    """(T, E) place of each token, from 0, by an expert's falling score: among the tokens that chose
    it, or among the others."""
    order = scores.sort(dim=0, descending=True, stable=True).indices  # (T, E)
    chosen, others = chosen.gather(0, order), others.gather(0, order)
    ranks = torch.where(chosen, chosen.cumsum(0), others.cumsum(0)) - 1
    return torch.empty_like(order).scatter_(0, order, ranks)


def _take(appeal: Tensor, others: Tensor, ranks: Tensor, wanted: Tensor) -> Tensor:
    """(T, E) bool, which expert takes which further token: at most one a token, `wanted` an expert.

    Each round an expert asks as many more tokens as it lacks, down its ranks; a token stays with
    the expert of most appeal (T, E) that has ever asked it.
    """
    experts = torch.arange(len(wanted), device=wanted.device)
    asked, taken = torch.zeros_like(wanted), torch.zeros_like(others)
    for _ in range(ROUNDS):
        asked = asked + wanted - taken.sum(0)
        asks = others & (ranks < asked)
        best = torch.where(asks, appeal, -1).argmax(-1, keepdim=True)  # (T, 1)
        taken = asks & (experts == best)
    return taken
