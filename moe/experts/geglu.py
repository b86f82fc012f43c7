"""GEGLU experts: y = w2 (gelu(w1 x) * (w3 x)), gelu(h) = h Phi(h) without an approximation.

w1 gate (E, F, D), w2 down (E, D, F), w3 up (E, F, D), laid out as in `nn.Linear`. Like `swiglu`
with another gate, but without its fused kernel: it keeps twice the rows for the backward pass.

Source: Shazeer, GLU variants, arXiv 2002.05202, equation 6; clamp: as in `swiglu`.
"""

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kernels.swiglu_torch import clamped
from moe.expert_rows import RowExperts
from moe.variants import Real, VariantConfig

EXAMPLES = ({"clamp": 0.5},)


class Config(VariantConfig):
    """clamp c: gate = min(gate, c), up = clip(up, -c, c) before their product, None for none."""

    name: Literal["geglu"] = "geglu"
    clamp: Annotated[Real, Field(gt=0)] | None = None

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        """gelu(gate) * up, all (..., F), gate and up after the clamp."""
        gate, up = clamped(gate, up, self.clamp)
        return F.gelu(gate) * up


class Experts(RowExperts):
    """E GEGLU networks D -> F -> D."""
