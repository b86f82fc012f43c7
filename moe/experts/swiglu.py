"""SwiGLU experts: y = w2 (silu(w1 x) * (w3 x)), as three stacked tensors.

w1 gate (E, F, D), w2 down (E, D, F), w3 up (E, F, D), laid out as in `nn.Linear`.

Source: Shazeer, GLU variants, arXiv 2002.05202; clamp: DeepSeek-V4.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kernels.dispatch import DispatchPlan
from kernels.swiglu_experts import swiglu_experts, swiglu_experts_sorted
from kernels.swiglu_torch import clamped
from moe.variants import Real, VariantConfig

EXAMPLES = ({"clamp": 0.5}, {"save": "x"}, {"save": "xha"})


class Config(VariantConfig):
    """clamp: bound of gate and up before their product, None for none; save: see the kernel."""

    name: Literal["swiglu"] = "swiglu"
    clamp: Annotated[Real, Field(gt=0)] | None = None
    save: Literal["x", "xh", "xha"] = "xh"

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up, all (..., F), gate and up after the clamp: as the kernel does."""
        gate, up = clamped(gate, up, self.clamp)
        return F.silu(gate) * up


class Experts(nn.Module):
    """E SwiGLU networks D -> F -> D."""

    fuses_dispatch = True

    def __init__(self, config: Config, num_experts: int, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.config = config
        self.w1 = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.w3 = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))

    def forward(
        self,
        x: Tensor,
        tokens_per_expert: Tensor,
        *,
        plan: DispatchPlan | None = None,
        topk_weights: Tensor | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Apply one expert to each row; with a plan, gather and sum as well, in one kernel.

        Args:
            x: (R, D) rows sorted by expert, with (E,) counts; with a plan (T, D) tokens.
            plan, topk_weights: of the tokens, the latter (T, K).
        Returns:
            (R, D); with a plan (T, D).
        """
        weights = self.w1, self.w2, self.w3
        clamp, save = self.config.clamp, self.config.save
        if plan is None:
            offsets = F.pad(tokens_per_expert.cumsum(0), (1, 0))
            return swiglu_experts_sorted(
                x, *weights, offsets, clamp=clamp, save=save, backend=backend
            )
        assert topk_weights is not None
        return swiglu_experts(
            x, *weights, plan, topk_weights, clamp=clamp, save=save, backend=backend
        )
