"""GELU experts, without a gate: y = w2 gelu(w1 x), gelu(h) = h Phi(h) without an approximation.

w1 (E, F, D), w2 (E, D, F), laid out as in `nn.Linear`; two thirds of the weights and FLOPs of a
gated expert of the same F.

Source: Hendrycks and Gimpel, arXiv 1606.08415.
"""

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from moe.expert_rows import RowExperts
from moe.variants import VariantConfig


class Config(VariantConfig):
    """No settings."""

    has_gate: ClassVar[bool] = False

    name: Literal["gelu"] = "gelu"

    def activate(self, hidden: Tensor) -> Tensor:
        """gelu(hidden), both (..., F)."""
        return F.gelu(hidden)


class Experts(RowExperts):
    """E GELU networks D -> F -> D."""
