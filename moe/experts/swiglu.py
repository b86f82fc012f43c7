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
from moe.variants import Real, VariantConfig


class Config(VariantConfig):
    """clamp: bound of gate and up before their product, None for none; save: see the kernel."""

    name: Literal["swiglu"] = "swiglu"
    clamp: Annotated[Real, Field(gt=0)] | None = None
    save: Literal["x", "xh", "xha"] = "xh"


class Experts(nn.Module):
    """E SwiGLU networks D -> F -> D."""

    def __init__(self, config: Config, num_experts: int, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.config = config
        self.w1 = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.w3 = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))

    def forward(self, rows: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """Apply one expert to each row: (R, D) sorted by expert, with (E,) counts -> (R, D)."""
        offsets = F.pad(tokens_per_expert.cumsum(0), (1, 0))
        return swiglu_experts_sorted(
            rows,
            self.w1,
            self.w2,
            self.w3,
            offsets,
            clamp=self.config.clamp,
            save=self.config.save,
        )

    def fused(self, x: Tensor, plan: DispatchPlan, topk_weights: Tensor) -> Tensor:
        """Gather, experts and weighted sum in one kernel: (T, D) -> (T, D)."""
        return swiglu_experts(
            x,
            self.w1,
            self.w2,
            self.w3,
            plan,
            topk_weights,
            clamp=self.config.clamp,
            save=self.config.save,
        )
