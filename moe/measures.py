"""How well is the load spread, how sure is the router, what do experts specialise in?

Every number that the project prints about experts is computed here, from counts or from a
`Routing`. `moe/GLOSSARY.md` explains them to a reader of TensorBoard and of reports.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from moe.routing import Routing

# ---- the load: (..., E) counts -> (...,)
#
# Below 0 a count says that the layer has no such expert, as `moe.routing.stack_layers` has it.


def _load_and_number(tokens_per_expert: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(..., E) counts, 0 where there is no expert, and (..., 1) the number of experts."""
    number = (tokens_per_expert >= 0).sum(-1, keepdim=True)
    return tokens_per_expert.clamp(min=0).to(dtype), number


def max_violation(tokens_per_expert: Tensor) -> Tensor:
    """MaxVio = max_i c_i / mean(c) - 1 over the last dimension: 0 when balanced, E/K - 1
    where K experts have all.

    Args: tokens_per_expert: (..., E) counts.
    Returns: (...,) float32; 0 where nothing was counted.
    Source: Wang et al., loss-free balancing, arXiv 2408.15664.
    """
    load, number = _load_and_number(tokens_per_expert, torch.float32)
    mean = load.sum(-1) / number.squeeze(-1)
    return torch.where(mean > 0, load.amax(-1) / mean.clamp(min=1e-9) - 1, 0.0)


def dead_experts(tokens_per_expert: Tensor) -> Tensor:
    """Number of experts with no assignment in the window that was counted: (..., E) -> (...,)."""
    return (tokens_per_expert == 0).sum(-1)


def starved_experts(tokens_per_expert: Tensor) -> Tensor:
    """Number of experts with fewer than 0.1 of the mean assignments: (..., E) -> (...,)."""
    load, number = _load_and_number(tokens_per_expert, torch.float32)
    mean = load.sum(-1, keepdim=True) / number
    return ((load < 0.1 * mean) & (tokens_per_expert >= 0)).sum(-1)


def least_assignments(tokens_per_expert: Tensor) -> Tensor:
    """Assignments of the expert that has fewest: (..., E) int64 -> (...,)."""
    most = torch.iinfo(tokens_per_expert.dtype).max
    return tokens_per_expert.masked_fill(tokens_per_expert < 0, most).amin(-1)


def effective_experts(tokens_per_expert: Tensor) -> Tensor:
    """exp(H(load)), from 1 (all to one expert) to E (uniform): (..., E) -> (...,)."""
    load = tokens_per_expert.clamp(min=0)
    share = load / load.sum(-1, keepdim=True).clamp(min=1)
    return torch.special.entr(share.float()).sum(-1).exp()


def coefficient_of_variation(tokens_per_expert: Tensor) -> Tensor:
    """Standard deviation of the load over its mean, 0 at balance: (..., E) -> (...,)."""
    load, number = _load_and_number(tokens_per_expert, torch.float64)
    mean = load.sum(-1, keepdim=True) / number
    # An expert that is not there deviates by 0, but is divided by.
    spread = load.where(tokens_per_expert >= 0, mean).std(-1, correction=0)
    spread = spread * (load.shape[-1] / number.squeeze(-1).double()).sqrt()
    return spread / mean.squeeze(-1).clamp(min=1e-9)


def gini(tokens_per_expert: Tensor) -> Tensor:
    """Gini coefficient of the load, 0 at balance, 1 - K/E where K experts have it all:
    (..., E) -> (...,).

    sum_i (2 i - E - 1) c_i / (E sum c), the counts in rising order, i from 1.
    """
    load, number = _load_and_number(tokens_per_expert, torch.float64)
    # In falling order, so that what is no expert comes last, and adds 0.
    load = load.sort(-1, descending=True).values
    behind = torch.arange(load.shape[-1], device=load.device, dtype=load.dtype)
    weighted = ((number - 1 - 2 * behind) * load).sum(-1)
    return weighted / (number.squeeze(-1) * load.sum(-1)).clamp(min=1e-9)


def load_share(tokens_per_expert: Tensor) -> Tensor:
    """Each expert's share of the assignments: (..., E) -> (..., E); 0 where nothing was counted."""
    load = tokens_per_expert.clamp(min=0).double()
    return load / load.sum(-1, keepdim=True).clamp(min=1)


# ---- the router's mind


class RouterSums(NamedTuple):
    """Sums over the valid tokens of one layer, each () float64 but the largest logit, a maximum.

    num_tokens; entropy of the probabilities, of log E; confidence p_1; margin p_K - p_{K+1} (0
    where K = E); logit_norm, the L2 norm of a token's logits; logsumexp of them; logit_max, the
    largest absolute logit.
    """

    num_tokens: Tensor
    entropy: Tensor
    confidence: Tensor
    margin: Tensor
    logit_norm: Tensor
    logsumexp: Tensor
    logit_max: Tensor


@torch.no_grad()
def router_sums(routing: Routing) -> RouterSums:
    """What `RouterSums` has, of one layer's Routing. Sigmoid scores are divided by their sum."""
    logits, probs, valid = routing.router_logits, routing.router_probs, routing.valid
    top_k, num_experts = routing.topk_indices.shape[-1], probs.shape[-1]
    share = probs / probs.sum(-1, keepdim=True).clamp(min=1e-20)
    entropy = torch.special.entr(share).sum(-1) / math.log(max(2, num_experts))  # (T,)
    ranked = probs.topk(min(top_k + 1, num_experts), dim=-1).values
    margin = ranked[:, top_k - 1] - ranked[:, top_k] if top_k < num_experts else 0 * ranked[:, 0]
    per_token = torch.stack(
        [
            entropy,
            ranked[:, 0],
            margin,
            torch.linalg.vector_norm(logits, dim=-1),
            logits.logsumexp(-1),
        ]
    )  # (5, T)
    sums = per_token.masked_fill(~valid, 0).double().sum(-1)
    largest = logits.abs().masked_fill(~valid.unsqueeze(-1), 0)
    # With no tokens at all there is no maximum.
    top = largest.amax().double() if largest.numel() else sums.new_zeros(())
    return RouterSums._make([routing.num_tokens.double(), *sums.unbind(), top])


# ---- routes: (..., K) chosen experts of each token, -1 for no assignment


def first_choice(routing: Routing) -> Tensor:
    """(T,) the expert with the largest weight of each token, -1 without any."""
    chosen = routing.chosen_indices
    best = routing.chosen_weights.detach().masked_fill(chosen < 0, -1).argmax(-1)
    return chosen.gather(-1, best.unsqueeze(-1)).squeeze(-1)


def co_activation_counts(topk_indices: Tensor, num_experts: int) -> Tensor:
    """(E, E) float64 tokens that chose both i and j, all pairs; on the diagonal, that chose i.

    Args: topk_indices: (T, K).
    """
    chosen = torch.zeros(
        len(topk_indices), num_experts + 1, dtype=torch.float32, device=topk_indices.device
    )
    chosen = chosen.scatter_(1, topk_indices + 1, 1.0)[:, 1:]  # (T, E)
    # Exact up to 2^24 tokens at a time.
    return (chosen.T @ chosen).double()


def co_activation(counts: Tensor) -> Tensor:
    """P(j | i) = N_ij / N_i from `co_activation_counts`: (..., E, E), rows of unused experts 0."""
    used = torch.diagonal(counts, dim1=-2, dim2=-1).unsqueeze(-1)
    return counts / used.clamp(min=1)


def independent_co_activation(counts: Tensor) -> Tensor:
    """What P(j | i) would be, were the other choices of a token that chose i independent of it:
    they are spread over the other experts by their loads, (..., E, E); the diagonal is 1.

    Args: counts: `co_activation_counts`.
    """
    chosen = torch.diagonal(counts, dim1=-2, dim2=-1)  # (..., E)
    others = (counts.sum(-1) - chosen) / chosen.clamp(min=1)  # choices beside i, mean
    elsewhere = (chosen.sum(-1, keepdim=True) - chosen).clamp(min=1)
    expected = (others / elsewhere).unsqueeze(-1) * chosen.unsqueeze(-2)
    own = torch.eye(counts.shape[-1], dtype=torch.bool, device=counts.device)
    return expected.masked_fill(own, 1.0)


def route_overlap(routes: Tensor, reference: Tensor) -> Tensor:
    """|A_t and B_t| summed over tokens, over |B_t| summed over tokens: 1 where nothing has changed.

    Router saturation where `reference` is of a later checkpoint (OLMoE, arXiv 2409.02060).

    Args: routes, reference: (..., T, K) of the same tokens.
    Returns: (...,) float64.
    """
    same = (routes.unsqueeze(-1) == reference.unsqueeze(-2)) & (reference >= 0).unsqueeze(-2)
    chosen = (reference >= 0).sum((-2, -1)).clamp(min=1)
    return same.sum((-3, -2, -1)).double() / chosen


def repeats(first_choices: Tensor, document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens with the same first choice as the token before them in the same document, and pairs.

    Their quotient is the repeat rate, 1/E by chance (Mixtral, arXiv 2401.04088, table 5).

    Args: first_choices, document_ids: (B, S); a first choice of -1 counts nowhere.
    Returns: two () int64.
    """
    before, after = first_choices[:, :-1], first_choices[:, 1:]
    pairs = (document_ids[:, :-1] == document_ids[:, 1:]) & (before >= 0) & (after >= 0)
    return (pairs & (before == after)).sum(), pairs.sum()


# ---- specialisation


def domain_expert_information(assignments: Tensor) -> Tensor:
    """How much of a token's domain its expert reveals: I(domain; expert) / H(domain), 0 to 1.

    Args: assignments: (..., num_domains, E) counts.
    Returns: (...,) float64; 0 with fewer than two domains.
    """
    joint = assignments.clamp(min=0).double()
    joint = joint / joint.sum((-2, -1), keepdim=True).clamp(min=1)
    domain, expert = joint.sum(-1), joint.sum(-2)
    entropy = torch.special.entr(domain).sum(-1)
    joint_entropy = torch.special.entr(joint).sum((-2, -1))
    information = entropy + torch.special.entr(expert).sum(-1) - joint_entropy
    return torch.where(entropy > 0, information / entropy.clamp(min=1e-12), 0.0)


def domain_divergence(assignments: Tensor) -> Tensor:
    """How far the domains' shares of experts lie apart: Jensen-Shannon divergence, nats.

    H(mean_d P_d) - mean_d H(P_d) over domains with assignments, each counting the same: from 0
    (every domain uses the experts alike) to log(number of domains).

    Args: assignments: (..., num_domains, E) counts.
    Returns: (...,) float64; 0 with fewer than two domains.
    """
    share = load_share(assignments)
    present = (assignments > 0).any(-1).double()
    number = present.sum(-1).clamp(min=1)
    mixture = share.sum(-2) / number.unsqueeze(-1)
    inside = torch.special.entr(share).sum(-1).sum(-1) / number
    return (torch.special.entr(mixture).sum(-1) - inside).clamp(min=0)


def vocabulary_specialisation(assignments: Tensor, occurrences: Tensor, least: int = 8) -> Tensor:
    """How much a token's id decides its expert: the largest share of its occurrences that one
    expert got, the mean over ids that occur `least` times, weighted by their occurrences.

    From K / E (each id spreads evenly) to 1 (each has an expert that it always goes to). It is
    above K / E by chance too, as the largest of several: compare it with permuted ids.

    Args:
        assignments: (..., E, N) counts of N ids. occurrences: (N,) of each.
    Returns:
        (...,) float64; 0 where no id occurs often enough.
    Source: OLMoE, arXiv 2409.02060, section 5.3 (there without the weights).
    """
    weight = occurrences.double() * (occurrences >= least)
    share = assignments.double() / occurrences.clamp(min=1)
    return (share.amax(-2) * weight).sum(-1) / weight.sum().clamp(min=1)
