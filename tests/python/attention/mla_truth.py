# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Attention over cached rows in float64, one query at a time, written from the maths."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def attend(q: Tensor, keys: Tensor, d_v: int, scale: float, sink: float = -math.inf) -> tuple[Tensor, float]:
    """One query head ``[d_qk]`` over ``[n, d_qk]`` keys: its output and log-sum-exp, which leaves the sink out."""
    scores = keys.double() @ q.double() * scale
    if len(scores) == 0:
        return torch.zeros(d_v, dtype=torch.float64), math.inf
    lse = float(scores.logsumexp(0))
    out = (scores - lse).exp() @ keys[:, :d_v].double()
    return out / (1 + math.exp(min(sink - lse, 700))) if sink < math.inf else torch.zeros_like(out), lse


def attend_all(
    q: Tensor, keys_of: Callable[[int, int, int], Tensor], d_v: int, scale: float, sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out and lse for q ``[batch, s_q, h_q, d_qk]``, whose query (b, i, h) sees the keys ``keys_of(b, i, h)``."""
    batch, s_q, h_q, _ = q.shape
    out = torch.zeros(batch, s_q, h_q, d_v, dtype=torch.float64)
    lse = torch.zeros(batch, h_q, s_q, dtype=torch.float64)
    for b in range(batch):
        for i in range(s_q):
            for h in range(h_q):
                head_sink = -math.inf if sink is None else float(sink[h])
                out[b, i, h], lse[b, h, i] = attend(q[b, i, h], keys_of(b, i, h), d_v, scale, head_sink)
    return out, lse
