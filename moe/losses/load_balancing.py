"""Load-balancing loss: the product of each expert's share of tokens and of probability.

    L = E * sum_i f_i P_i,   f_i = c_i / (K T),   P_i = mean over tokens of router_probs[:, i]

1 at uniform; f has no gradient. Per layer; the model averages over layers. (Hugging Face pools the
layers before the product and has its minimum at K.) Padding counts nowhere. What f_i counts:

    global_batch   all tokens of the optimizer step, over ranks and accumulation (default): the
                   gradient is the same for any split of the batch
    micro_batch    the tokens of this forward pass
    sequence       each sequence for itself, then the mean over sequences

Sources: Switch Transformers, arXiv 2101.03961, equations 4-6; global batch: Qiu et al., arXiv
2501.11873; sequence: DeepSeek-V3, arXiv 2412.19437, equations 17-20.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from moe.losses import LossContext
from moe.routing import Routing, counts_by_sequence
from moe.variants import Real, VariantConfig

EXAMPLES = ({"scope": "micro_batch"}, {"scope": "sequence"})


class Config(VariantConfig):
    """weight of the term; its scope; how `global_batch` learns the counts under accumulation.

    accumulation: `exact` takes the counts of the whole step from a forward pass without gradients
    first (about a third more time); `running` uses the counts so far, an approximation. In a short
    training with 2, 4 and 8 micro-batches of 1,024 tokens together, its value is off by 0.2 % and
    the routers' gradient of it by 2.7 %, 3.4 % and 3.9 %:
    `python -m pytest tests/test_balance_accumulation.py -k running -s`.
    """

    name: Literal["load_balancing"] = "load_balancing"
    weight: Annotated[Real, Field(ge=0)] = 0.01
    scope: Literal["micro_batch", "sequence", "global_batch"] = "global_batch"
    accumulation: Literal["exact", "running"] = "exact"

    @model_validator(mode="after")
    def _accumulation_counts(self):
        if self.accumulation == "running" and self.scope != "global_batch":
            raise ValueError(
                f"accumulation (running) has no effect with scope ({self.scope}); it belongs to "
                f"scope: global_batch"
            )
        return self

    @property
    def label(self) -> str:
        """Its name in logs, which says where the value is an approximation."""
        return f"{self.name}_approximate" if self.accumulation == "running" else self.name

    @property
    def reads_batch_counts(self) -> bool:
        """Whether it looks at counts of more than this forward pass."""
        return self.scope == "global_batch"

    @property
    def needs_batch_counts(self) -> bool:
        """Whether the whole step's counts must be known before the first backward pass."""
        return self.reads_batch_counts and self.accumulation == "exact"


def loss(config: Config, routing: Routing, context: LossContext) -> Tensor:
    """One layer's loss, () float32."""
    probs = routing.router_probs
    num_experts = probs.shape[-1]
    # Sigmoid scores do not sum to 1; their share does, as in DeepSeek-V3.
    probs = probs / probs.sum(-1, keepdim=True).clamp(min=1e-20)
    valid = context.router.valid
    if valid is not None:
        probs = probs * valid.unsqueeze(-1)
    if config.scope == "sequence":
        return _sequence_loss(routing, probs, context)
    counts = routing.demand
    if config.scope == "global_batch" and context.batch_tokens_per_expert is not None:
        counts = context.batch_tokens_per_expert
    frequency = counts.to(probs.dtype) / counts.sum().clamp(min=1)  # (E,) f_i
    mean_probs = probs.sum(0) / routing.num_tokens.clamp(min=1)  # (E,) P_i
    return num_experts * torch.dot(frequency, mean_probs)


def _sequence_loss(routing: Routing, probs: Tensor, context: LossContext) -> Tensor:
    batch, seq_len = context.router.batch_shape
    num_experts = probs.shape[-1]
    counts = counts_by_sequence(routing, batch).to(probs.dtype)  # (B, E)
    valid = context.router.valid
    lengths = probs.new_full((batch,), seq_len) if valid is None else valid.view(batch, -1).sum(1)
    frequency = counts / counts.sum(1, keepdim=True).clamp(min=1)
    mean_probs = probs.view(batch, seq_len, num_experts).sum(1) / lengths.clamp(min=1).unsqueeze(-1)
    per_sequence = num_experts * (frequency * mean_probs).sum(-1)  # (B,)
    # Weighted by length, so that a sequence of padding alone counts nothing.
    return (per_sequence * lengths).sum() / lengths.sum().clamp(min=1)
