# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Mixture of experts from its formulas, token by token in float64; gradients by torch's autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def wide(tensor: Tensor | None) -> Tensor | None:
    """A float64 copy that gathers a gradient."""
    return None if tensor is None else tensor.detach().double().requires_grad_()


def scores_of(logits: Tensor, scoring: str) -> Tensor:
    if scoring == "softmax":
        return logits.exp() / logits.exp().sum(-1, keepdim=True)
    if scoring == "sigmoid":
        return 1 / (1 + (-logits).exp())
    return (1 + logits.exp()).log().sqrt()


def selection(values: list[float], topk: int, n_group: int, topk_group: int) -> list[int]:
    """Experts by decreasing value, the smaller index first; only from the groups with the best two values summed."""
    size = len(values) // n_group
    groups = [values[g * size : (g + 1) * size] for g in range(n_group)]
    order = sorted(range(n_group), key=lambda g: (-sum(sorted(groups[g])[-2:]), g))
    allowed = [e for e in range(len(values)) if e // size in order[:topk_group]]
    return sorted(allowed, key=lambda e: (-values[e], e))[:topk]


def gate(
    logits: Tensor,
    topk: int,
    *,
    bias: Tensor | None = None,
    scoring: str = "softmax",
    renormalize: bool = True,
    renormalize_after_drop: bool = False,
    routed_scaling_factor: float = 1.0,
    n_group: int = 1,
    topk_group: int = 1,
    capacity_rows: int | None = None,
    token_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
) -> tuple[Tensor, list[list[int]]]:
    """Weights [tokens, topk] and, per token, the expert of each slot or -1 - expert where dropped."""
    tokens, experts = logits.shape
    scores = scores_of(logits, scoring)
    taken = [0] * experts
    rows, indices = [], []
    for t in range(tokens):
        if tid2eid is not None:
            chosen = [int(e) for e in tid2eid[int(token_ids[t])]]
        else:
            values = scores[t].detach() if bias is None else scores[t].detach() + bias.double()
            chosen = selection(values.tolist(), topk, n_group, topk_group)
        kept = []
        for e in chosen:
            kept.append(capacity_rows is None or taken[e] < capacity_rows)
            taken[e] += kept[-1]
        total = torch.ones((), dtype=torch.float64)
        if renormalize_after_drop:
            total = sum((scores[t, e] for e, k in zip(chosen, kept, strict=True) if k), start=total * 0) + 1e-20
        elif renormalize:
            total = sum((scores[t, e] for e in chosen), start=total * 0) + 1e-20
        pairs = zip(chosen, kept, strict=True)
        rows.append(torch.stack([scores[t, e] / total * routed_scaling_factor * float(k) for e, k in pairs]))
        indices.append([e if k else -1 - e for e, k in zip(chosen, kept, strict=True)])
    return torch.stack(rows) if rows else logits.new_zeros(0, topk), indices


def swiglu(z: Tensor, limit: float | None) -> Tensor:
    g, u = z.chunk(2, -1)
    if limit is not None:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    return g / (1 + (-g).exp()) * u


def experts(
    x: Tensor,
    weights: Tensor,
    indices: list[list[int]],
    w13: Tensor,
    w2: Tensor,
    shared_w13: Tensor | None = None,
    shared_w2: Tensor | None = None,
    limit: float | None = None,
    z: Tensor | None = None,
    shared_z: Tensor | None = None,
) -> Tensor:
    """Σ over a token's kept slots. Given z [pairs, 2 * intermediate], by expert, then token, then slot, those values
    stand in for the products x · w13ᵀ (with the derivative of the products): the operator's stored pre-activations.
    """
    order = sorted((e, t, k) for t, slots in enumerate(indices) for k, e in enumerate(slots) if e >= 0)
    y = [torch.zeros(x.shape[1], dtype=torch.float64) for _ in range(x.shape[0])]
    for row, (e, t, k) in enumerate(order):
        product = w13[e] @ x[t]
        if z is not None:
            product = product + (z[row].double() - product).detach()
        y[t] = y[t] + weights[t, k] * (w2[e] @ swiglu(product, limit))
    result = torch.stack(y) if y else x * 0
    if shared_w13 is not None:
        product = x @ shared_w13.T
        if shared_z is not None:
            product = product + (shared_z.double() - product).detach()
        result = result + swiglu(product, limit) @ shared_w2.T
    return result


def layer(X: Tensor, gate_weight: Tensor, w13: Tensor, w2: Tensor, *shared: Tensor | None, **options: Any) -> Tensor:
    """The whole layer; options are those of moe_megakernel_fwd, plus gate_bias."""
    limit, capacity = options.pop("swiglu_limit", None), options.pop("capacity", None)
    x = X.reshape(-1, X.shape[-1])
    topk = options.pop("topk")
    if capacity is not None:
        options["capacity_rows"] = -int(-(x.shape[0] * topk / w13.shape[0] * capacity) // 1)
    weights, indices = gate(x @ gate_weight.T, topk, bias=options.pop("gate_bias", None), **options)
    return experts(x, weights, indices, w13, w2, *shared, limit=limit).view(X.shape)
