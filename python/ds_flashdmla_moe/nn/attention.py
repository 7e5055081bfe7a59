# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Latent attention as a module: whole sequences on the fly, token by token through a latent cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import rope_frequencies
from . import library
from .float32_buffers import Float32Buffers
from .operators import OperatorSet

__all__ = ["DMLAAttention", "LatentCache"]


class LatentCache:
    """The latent keys and values [batch, heads, capacity, d_lat] of one layer; the first ``length`` rows are filled.

    It holds ``2 * heads * d_lat`` numbers per token instead of ``2 * heads * head_dim``.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        capacity: int,
        d_lat: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch, heads, capacity, d_lat)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k, v [batch, heads, new, d_lat]; return views of everything filled so far."""
        end = self.length + k.shape[2]
        if end > self.k.shape[2]:
            raise ValueError(f"LatentCache: capacity is {self.k.shape[2]} tokens, got {end}")
        self.k[:, :, self.length : end] = k
        self.v[:, :, self.length : end] = v
        self.length = end
        return self.k[:, :, :end], self.v[:, :, :end]


class DMLAAttention(Float32Buffers):
    """Causal self-attention of x [batch, tokens, hidden] over per-head keys and values of rank d_lat.

    ``q, k, v = x·Wq, x·Wk, x·Wv`` per head [head_dim]; RoPE (interleaved pairs) on q and k; then
    :func:`ds_flashdmla_moe.flash_dmla_fwd` with WK, WV [head_dim, d_lat], which the heads of a layer share;
    then the output projection. ``decode`` computes the same numbers for appended tokens, keeping only
    ``k·WK`` and ``v·WV`` of the past.
    """

    inv_freq: Tensor

    def __init__(
        self,
        hidden: int,
        heads: int,
        head_dim: int,
        d_lat: int,
        *,
        rope_theta: float = 10000.0,
        ops: OperatorSet = library,
    ) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"DMLAAttention: head_dim must be even, got {head_dim}")
        self.ops = ops
        self.heads, self.head_dim, self.d_lat = heads, head_dim, d_lat
        self.qkv = nn.Linear(hidden, 3 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, hidden, bias=False)
        self.wk = nn.Parameter(torch.empty(head_dim, d_lat))
        self.wv = nn.Parameter(torch.empty(head_dim, d_lat))
        nn.init.orthogonal_(self.wk)  # keeps the norms of q, k, v up to the part that the rank cuts off
        nn.init.orthogonal_(self.wv)
        self.register_buffer("inv_freq", rope_frequencies(head_dim, rope_theta), persistent=False)

    def make_cache(self, batch: int, capacity: int) -> LatentCache:
        return LatentCache(batch, self.heads, capacity, self.d_lat, self.wk.dtype, self.wk.device)

    def _project(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [batch, heads, tokens, head_dim] of tokens at positions start, start + 1, …"""
        batch, tokens, _ = x.shape
        qk, v = self.qkv(x).view(batch, tokens, 3 * self.heads, self.head_dim).tensor_split([2 * self.heads], dim=2)
        positions = torch.arange(start, start + tokens, device=x.device)
        q, k = self.ops.rope(qk, positions, self.inv_freq).transpose(1, 2).chunk(2, dim=1)
        return q, k, v.transpose(1, 2)

    def _merge(self, o: Tensor) -> Tensor:
        out: Tensor = self.out(o.transpose(1, 2).flatten(2))
        return out

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._project(x, 0)
        return self._merge(self.ops.flash_dmla_fwd(q, k, v, self.wk, self.wv, d_lat=self.d_lat, causal=True))

    def decode(self, x: Tensor, cache: LatentCache) -> Tensor:
        """Attend x [batch, new tokens, hidden] to the cache and themselves; appends them to the cache."""
        q, k, v = self._project(x, cache.length)
        k_lat, v_lat = cache.append(k @ self.wk, v @ self.wv)
        o = self.ops.flash_dmla_fwd(
            q, k_lat, v_lat, self.wk, self.wv, d_lat=self.d_lat, causal=True, cache_is_latent=True
        )
        return self._merge(o)
