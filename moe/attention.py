"""Causal self-attention with grouped queries, RoPE, optional QK-norm and a KV cache."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.attention import fused_attention
from kernels.rope import apply_rope
from moe.config import ModelConfig
from moe.modules import Linear, RMSNorm


class KVCache(NamedTuple):
    """Keys and values of the tokens so far, each (B, S_past, G, P)."""

    keys: Tensor
    values: Tensor


class CausalSelfAttention(nn.Module):
    """(B, S, D) -> (B, S, D); tokens see earlier tokens of their own document."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        attention = config.attention
        eps, self.backend = config.norm_eps, config.kernel_backend
        self.num_heads, self.num_kv_heads = attention.num_heads, config.num_kv_heads
        self.head_dim, self.window = config.head_dim, attention.window
        self.rope_theta, self.qk_norm = attention.rope_theta, attention.qk_norm
        hidden = config.hidden_size
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.wq = Linear(hidden, q_size)
        self.wk = Linear(hidden, kv_size)
        self.wv = Linear(hidden, kv_size)
        self.wo = Linear(q_size, hidden)
        if self.qk_norm != "none":
            per_head = self.qk_norm == "head"
            self.q_norm = RMSNorm(self.head_dim if per_head else q_size, eps, self.backend)
            self.k_norm = RMSNorm(self.head_dim if per_head else kv_size, eps, self.backend)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, KVCache]:
        """Args:
            x: (B, S, D). positions: (S,), of these tokens.
            document_ids: (B, S_past + S), or None for one document a row.
            cache: keys and values of earlier tokens.
        Returns:
            (B, S, D), and the cache with these tokens added.
        """
        batch, seq_len, _ = x.shape
        q, k, v = self.wq(x), self.wk(x), self.wv(x)  # (B, S, H*P), (B, S, G*P) twice
        if self.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.view(batch, seq_len, self.num_heads, self.head_dim)  # (B, S, H, P)
        k = k.view(batch, seq_len, self.num_kv_heads, self.head_dim)  # (B, S, G, P)
        v = v.view(batch, seq_len, self.num_kv_heads, self.head_dim)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, k, positions, theta=self.rope_theta, backend=self.backend)
        if cache is not None:
            k = torch.cat([cache.keys, k], 1)  # (B, S_past + S, G, P)
            v = torch.cat([cache.values, v], 1)
        out = fused_attention(
            q, k, v, document_ids=document_ids, window=self.window, backend=self.backend
        )
        return self.wo(out.reshape(batch, seq_len, -1)), KVCache(k, v)
