# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Softmax attention and its gradients in float64, written from the maths, on ``[..., heads, rows, d]`` tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(s_q: int, s_kv: int, causal: bool) -> Tensor:
    """``[s_q, s_kv]``: whether query i sees key j."""
    query, key = torch.arange(s_q)[:, None], torch.arange(s_kv)[None, :]
    return key <= query + s_kv - s_q if causal else torch.ones(s_q, s_kv, dtype=torch.bool)


def _group(q: Tensor, k: Tensor) -> int:
    return q.shape[-3] // k.shape[-3] if k.shape[-3] else 1


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """out and lse; differentiable. Key heads are repeated for their group of query heads."""
    q, k, v = q.double(), k.double(), v.double()
    group = _group(q, k)
    k, v = k.repeat_interleave(group, -3), v.repeat_interleave(group, -3)
    mask = visible(q.shape[-2], k.shape[-2], causal)
    some = mask.any(-1)
    scores = (q @ k.mT * scale).masked_fill(~mask, -torch.inf)
    # Queries without keys are kept out of every function that is not differentiable there.
    lse = torch.where(some[:, None], scores, 0.0).logsumexp(-1)
    p = torch.where(mask, (scores - lse[..., None]).exp(), 0.0)
    return p @ v, torch.where(some, lse, -torch.inf)


def attention_gradients(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, causal: bool
) -> tuple[Tensor, ...]:
    """dq, dk, dv by the formula, given the output as it was stored; then, for each of them, the sums of the magnitudes
    of the terms that its elements are sums of."""
    dout, dlse, q, k, v, out = (t.double() for t in (dout, dlse, q, k, v, out))
    heads, group = k.shape[-3], _group(q, k)
    _, lse = attention(q, k, v, scale, causal)
    wide_k, wide_v = k.repeat_interleave(group, -3), v.repeat_interleave(group, -3)
    mask = visible(q.shape[-2], k.shape[-2], causal)
    p = torch.where(mask, (q @ wide_k.mT * scale - lse[..., None]).exp(), 0.0)
    dp = dout @ wide_v.mT
    delta = (dout * out).sum(-1) - dlse
    ds = p * (dp - delta[..., None])
    ds_terms = p * (dout.abs() @ wide_v.mT.abs() + (dout * out).abs().sum(-1)[..., None] + dlse.abs()[..., None])

    def grouped(t: Tensor) -> Tensor:
        return t.unflatten(-3, (heads, group)).sum(-3)

    results = (ds @ wide_k * scale, grouped(ds.mT @ q * scale), grouped(p.mT @ dout))
    terms = (
        ds_terms @ wide_k.abs() * abs(scale),
        grouped(ds_terms.mT @ q.abs() * abs(scale)),
        grouped(p.mT @ dout.abs()),
    )
    return (*results, *terms)


def largest(t: Tensor) -> float:
    return float(t.detach().abs().max()) if t.numel() else 0.0
