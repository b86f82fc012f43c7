"""Squared-ReLU experts, without a gate: y = w2 max(w1 x, 0)^2.

w1 (E, F, D), w2 (E, D, F), laid out as in `nn.Linear`; two thirds of the weights and FLOPs of a
gated expert of the same F.

Source: So et al., Primer, arXiv 2109.08668, section 4.
"""

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from moe.expert_rows import RowExperts
from moe.variants import VariantConfig


class Config(VariantConfig):
    """No settings."""

    has_gate: ClassVar[bool] = False

    name: Literal["relu2"] = "relu2"

    def activate(self, hidden: Tensor) -> Tensor:
        """max(hidden, 0)^2, both (..., F)."""
        return F.relu(hidden).square()


class Experts(RowExperts):
    """E squared-ReLU networks D -> F -> D."""
