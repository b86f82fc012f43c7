"""Linear layers and norms of the model: kernels with their weights."""

import torch
from torch import Tensor, nn

from kernels.matmul import linear
from kernels.rms_norm import rms_norm


class Linear(nn.Linear):
    """`kernels.matmul.linear` with its weight (D_out, D_in); without bias."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """`kernels.rms_norm` with its weight (D,)."""

    def __init__(self, size: int, eps: float, backend: str = "auto"):
        super().__init__()
        self.eps, self.backend = eps, backend
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, backend=self.backend)
