# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Attention over chosen rows and its gradients in float64, one query and key head at a time, from the definition."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from tolerance import FLOATING

INT_MIN, INT_MAX = -(2**31), 2**31 - 1


class Problem(NamedTuple):
    q: Tensor
    kv: Tensor
    indices: Tensor
    d_v: int
    scale: float
    attn_sink: Tensor | None = None
    topk_length: Tensor | None = None

    def arguments(self) -> tuple[object, ...]:
        """In the order of the public function."""
        return self.q, self.kv, self.indices, self.scale, self.d_v, self.attn_sink, self.topk_length

    def lists(self) -> Iterator[tuple[int, int, slice, list[int], list[int]]]:
        """query, key head, its query heads, the slots that are keys, and the rows they name."""
        group = self.q.shape[1] // self.kv.shape[1]
        for query, kv_head in torch.cartesian_prod(torch.arange(self.q.shape[0]), torch.arange(self.kv.shape[1])):
            i, g = int(query), int(kv_head)
            names = self.indices[i, g].tolist()
            if self.topk_length is not None:
                names = names[: max(int(self.topk_length[i]), 0)]
            slots = [slot for slot, name in enumerate(names) if 0 <= name < self.kv.shape[0]]
            yield i, g, slice(g * group, (g + 1) * group), slots, [names[slot] for slot in slots]


def attention(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, max_logits, lse, key_probs."""
    q, kv = problem.q.double(), problem.kv.double()
    out = q.new_zeros(*q.shape[:2], problem.d_v)
    max_logits, lse = q.new_full(q.shape[:2], -torch.inf), q.new_full(q.shape[:2], torch.inf)
    key_probs = q.new_zeros(problem.indices.shape)
    for i, g, heads, slots, rows in problem.lists():
        if not slots:
            continue
        scores = problem.scale * q[i, heads] @ kv[rows, g].T
        max_logits[i, heads], lse[i, heads] = scores.amax(-1), scores.logsumexp(-1)
        logits = scores
        if problem.attn_sink is not None:
            logits = torch.cat([scores, problem.attn_sink.double()[heads, None]], -1)
        p = logits.softmax(-1)[:, : len(slots)]
        out[i, heads] = p @ kv[rows, g, : problem.d_v]
        key_probs[i, g, slots] = p.sum(0)
    return out, max_logits, lse, key_probs


def gradients(problem: Problem, dout: Tensor, dlse: Tensor, out: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """dq, dkv and dattn_sink given the output as it was stored; and the sums of the magnitudes of their terms."""
    q, kv, dout, dlse, out = (t.detach().double() for t in (problem.q, problem.kv, dout, dlse, out))
    sink = q.new_full(q.shape[1:2], -torch.inf) if problem.attn_sink is None else problem.attn_sink.detach().double()
    results = [torch.zeros_like(q), torch.zeros_like(kv), torch.zeros_like(sink)]
    terms = [torch.zeros_like(q), torch.zeros_like(kv), torch.zeros_like(sink)]
    for i, g, heads, slots, rows in problem.lists():
        if not slots:
            continue
        keys, values = kv[rows, g], kv[rows, g, : problem.d_v]
        scores = problem.scale * q[i, heads] @ keys.T
        total = scores.logsumexp(-1, keepdim=True)
        w, kept = (scores - total).exp(), torch.sigmoid(total - sink[heads, None])
        p, products = w * kept, dout[i, heads] * out[i, heads]
        dp = dout[i, heads] @ values.T
        ds = p * (dp - products.sum(-1, keepdim=True)) + w * dlse[i, heads, None]
        magnitudes = p * (dout[i, heads].abs() @ values.T.abs() + products.abs().sum(-1, keepdim=True))
        magnitudes += w * dlse[i, heads, None].abs()
        for target, a, b, query, keyed, weighted in (
            (results, ds, products, q[i, heads], keys, dout[i, heads]),
            (terms, magnitudes, products.abs(), q[i, heads].abs(), keys.abs(), dout[i, heads].abs()),
        ):
            size = problem.scale if target is results else abs(problem.scale)
            target[0][i, heads] = size * a @ keyed
            contribution = size * a.T @ query
            contribution[:, : problem.d_v] += p.T @ weighted
            target[1][:, g].index_add_(0, torch.tensor(rows), contribution)
            target[2][heads] += (-1 if target is results else 1) * (1 - kept[:, 0]) * b.sum(-1)
    return results, terms


def largest(t: Tensor) -> float:
    return float(t.detach().abs().max()) if t.numel() else 0.0


def draw(
    s_q: int = 5,
    s_kv: int = 23,
    h_q: int = 4,
    h_kv: int = 1,
    d_qk: int = 20,
    d_v: int = 12,
    topk: int = 9,
    dtype: torch.dtype = torch.float32,
    sink: bool = True,
    lengths: bool = True,
) -> Problem:
    """Scores of about ±10 and, among the indices, duplicates and everything that is no row."""
    wide = torch.promote_types(dtype, torch.float32)
    indices = torch.randint(-1, s_kv + 1, (s_q, h_kv, topk), dtype=torch.int32)
    for slot, name in enumerate((INT_MIN, INT_MAX, s_kv, -1)):
        indices[..., 1 + slot : 2 + slot] = name
    return Problem(
        (torch.randn(s_q, h_q, d_qk) * 3).to(dtype),
        torch.randn(s_kv, h_kv, d_qk).to(dtype),
        indices,
        d_v,
        d_qk**-0.5 if d_qk else 1.0,
        (2 * torch.randn(h_q)).to(wide) if sink else None,
        torch.randint(-2, topk + 3, (s_q,), dtype=torch.int32) if lengths else None,
    )


# Sizes that differ from draw's defaults.
SIZES: list[dict[str, int]] = [
    {},
    {"h_q": 6, "h_kv": 3, "topk": 70},
    {"h_q": 1, "d_v": 20},
    {"h_q": 130, "topk": 33, "s_q": 2},
    {"topk": 1},
    {"topk": 0},
    {"s_q": 0},
    {"s_kv": 0},
    {"h_q": 0},
    {"d_v": 0},
    {"d_qk": 0, "d_v": 0},
]


@st.composite
def any_problem(choose: st.DrawFn, most_keys: int) -> dict[str, Any]:
    """Arguments of draw."""
    h_kv, d_v = choose(st.integers(1, 3)), choose(st.integers(0, 40))
    return {
        "s_q": choose(st.integers(0, 6)),
        "s_kv": choose(st.integers(0, 40)),
        "h_q": h_kv * choose(st.integers(1, 9)),
        "h_kv": h_kv,
        "d_qk": d_v + choose(st.integers(0, 17)),
        "d_v": d_v,
        "topk": choose(st.integers(0, most_keys)),
        "dtype": choose(st.sampled_from(FLOATING)),
        "sink": choose(st.booleans()),
        "lengths": choose(st.booleans()),
    }
