"""What have experts without a kernel of their own in common? Matmuls over sorted rows, by autograd.

The Config of a file in `moe/experts` says what stands between them; permuting rows and summing them
is left to `moe.dispatcher`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.grouped_matmul import grouped_matmul


class RowExperts(nn.Module):
    """E networks D -> F -> D: y = w2 config.activate(w1 x, w3 x), without w3 where config.has_gate
    is False.

    w1 (E, F, D), w2 (E, D, F), w3 (E, F, D), laid out as in `nn.Linear`. Experts without a gate
    have no w3 at all, so none is counted, optimized, clipped or written to a checkpoint.
    """

    def __init__(self, config: Any, num_experts: int, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.config = config
        self.w1 = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.w2 = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        if config.has_gate:
            self.w3 = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))

    def forward(self, rows: Tensor, tokens_per_expert: Tensor, *, backend: str = "auto") -> Tensor:
        """Apply one expert to each row.

        Args:
            rows: (R, D), sorted by expert; those behind the last expert's are never read.
            tokens_per_expert: (E,) int64 number of rows of each.
            backend: of `kernels.grouped_matmul`.
        Returns:
            (R, D), unused rows 0.
        """
        offsets = F.pad(tokens_per_expert.cumsum(0), (1, 0))  # (E+1,)
        inward = (self.w1, self.w3) if self.config.has_gate else (self.w1,)
        hidden = [grouped_matmul(rows, w, offsets, backend=backend) for w in inward]  # (R, F) each
        activated = self.config.activate(*hidden)  # (R, F)
        return grouped_matmul(activated, self.w2, offsets, backend=backend)
