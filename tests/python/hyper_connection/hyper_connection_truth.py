# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Hyper-connections in float64, element by element as the model's description has them."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(*tensors: Tensor) -> list[Tensor]:
    """Leaves of the same values in float64."""
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def mixes(x: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    row = x.flatten(-2)
    return (row @ fn.mT) / torch.sqrt((row * row).mean(-1, keepdim=True) + norm_eps)


def gate(activation: Tensor, eps: float) -> Tensor:
    return 1 / (1 + torch.exp(-activation)) + eps


def mix(x: Tensor, weights: Tensor) -> Tensor:
    return sum(weights[..., j, None] * x[..., j, :] for j in range(x.shape[-2]))


def pre(
    x: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    iterations: int = 20,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
    post_mult: float = 2.0,
) -> tuple[Tensor, Tensor, Tensor]:
    hc = x.shape[-2]
    m = mixes(x, fn, norm_eps)
    weights = gate(m[..., :hc] * scale[0] + base[:hc], eps)
    post = post_mult * gate(m[..., hc : 2 * hc] * scale[1] + base[hc : 2 * hc], 0.0)
    c = (m[..., 2 * hc :] * scale[2] + base[2 * hc :]).reshape(*x.shape[:-2], hc, hc)
    c = torch.exp(c - torch.logsumexp(c, -1, keepdim=True)) + eps
    for iteration in range(iterations):
        if iteration > 0:
            c = torch.stack([c[..., j, :] / (c[..., j, :].sum(-1, keepdim=True) + eps) for j in range(hc)], -2)
        c = torch.stack([c[..., :, k] / (c[..., :, k].sum(-1, keepdim=True) + eps) for k in range(hc)], -1)
    return mix(x, weights), post, c


def post(y: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    hc = x.shape[-2]
    return torch.stack([post[..., k, None] * y + mix(x, comb[..., :, k]) for k in range(hc)], -2)


def head(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float = 1e-6, norm_eps: float = 1e-6) -> Tensor:
    return mix(x, gate(mixes(x, fn, norm_eps) * scale[0] + base, eps))


def parameters(hc: int, hidden: int, outputs: int, scales: int, dtype: torch.dtype) -> list[Tensor]:
    """fn, base and scale with which the mixes are of order 1, for x of the dtype."""
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    fn = torch.randn(outputs, hc * hidden, dtype=kind) * (hc * hidden) ** -0.5
    return [fn, torch.randn(outputs, dtype=kind), torch.randn(scales, dtype=kind)]
