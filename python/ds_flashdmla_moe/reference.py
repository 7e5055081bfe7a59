# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The operators of the training step, composed from torch's own operators.

The functions have the names, arguments and results of the library's operators, so a model takes either set
(:class:`ds_flashdmla_moe.nn.OperatorSet`); they check no arguments. This is what the library is timed against,
so it is written to run fast in torch: fused SDPA, one gather and one scatter per expert layer, stacked gradients.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .moe import MoEWeights
    from .ops.moe import Scoring
    from .qtensor import QTensor

__all__ = [
    "flash_dmla_fwd",
    "moe_forward_unfused",
    "moe_gate",
    "moe_megakernel_fwd",
    "rms_norm",
    "rope",
]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(mean(x², -1) + eps) * weight``; x [..., n], weight [n] or None."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rope(x: Tensor, positions: Tensor, inv_freq: Tensor, interleaved: bool = True, inverse: bool = False) -> Tensor:
    """Rotate pairs of the last ``2 * len(inv_freq)`` of x [..., tokens, heads, d] by ``positions * inv_freq``.

    Pair i is (2i, 2i+1) when ``interleaved``, else (i, pairs + i); ``inverse`` rotates back.
    """
    d, rotated = x.shape[-1], 2 * inv_freq.numel()
    if rotated < d:
        y = rope(x[..., d - rotated :], positions, inv_freq, interleaved, inverse)
        return torch.cat((x[..., : d - rotated], y), dim=-1)
    angle = positions.to(torch.float32)[..., None, None] * inv_freq
    angle = angle.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = angle.cos(), angle.sin()
    if inverse:
        sin = -sin
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


def flash_dmla_fwd(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    WK: Tensor | None = None,
    WV: Tensor | None = None,
    d_lat: int | None = None,
    causal: bool = False,
    cache_is_latent: bool = False,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    return_latent: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Latent attention; arguments and result as :func:`ds_flashdmla_moe.flash_dmla_fwd`."""
    scale = Q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    q = Q if WK is None else Q @ WK
    k = K if cache_is_latent or WK is None else K @ WK
    v = V if cache_is_latent or WV is None else V @ WV
    s_q, s_kv = q.shape[-2], k.shape[-2]
    if causal and s_q > s_kv:
        raise ValueError(f"flash_dmla_fwd: causal needs s_q <= s_kv, got {s_q} > {s_kv}")
    if return_lse:
        scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
        if causal:
            later = torch.ones(s_q, s_kv, dtype=torch.bool, device=q.device).triu(s_kv - s_q + 1)
            scores = scores.masked_fill(later, -math.inf)
        lse = scores.logsumexp(-1)
        out = torch.exp(scores - lse[..., None]).nan_to_num(0.0).to(v.dtype) @ v
    elif s_q == s_kv or s_q == 1 or not causal:  # a single last query sees every key
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal and s_q > 1, scale=scale)
    else:
        mask = torch.ones(s_q, s_kv, dtype=torch.bool, device=q.device).tril(s_kv - s_q)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if WV is not None and not return_latent:
        out = out @ WV.transpose(-1, -2)
    return (out, lse) if return_lse else out


def moe_gate(
    logits: Tensor,
    topk: int,
    *,
    bias: Tensor | None = None,
    scoring: Scoring = "softmax",
    renormalize: bool = True,
    renormalize_after_drop: bool = False,
    routed_scaling_factor: float = 1.0,
    n_group: int = 1,
    topk_group: int = 1,
    capacity_rows: int | None = None,
    token_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Routing; arguments and result as :func:`ds_flashdmla_moe.ops.moe_gate`."""
    if scoring == "softmax":
        scores = logits.softmax(-1)
    elif scoring == "sigmoid":
        scores = logits.sigmoid()
    else:
        scores = F.softplus(logits).sqrt()
    if tid2eid is not None and token_ids is not None:
        indices = tid2eid[token_ids].long()
    else:
        choice = scores.detach() if bias is None else scores.detach() + bias
        if n_group > 1:
            groups = choice.view(choice.shape[0], n_group, -1)
            worth = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)
            kept = torch.zeros_like(worth, dtype=torch.bool).scatter_(-1, worth.topk(topk_group, dim=-1).indices, True)
            choice = groups.masked_fill(~kept[..., None], -math.inf).flatten(-2)
        indices = choice.topk(topk, dim=-1).indices
    weights = scores.gather(-1, indices)
    if renormalize and not renormalize_after_drop:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    if capacity_rows is not None:
        within = _within_capacity(indices, logits.shape[-1], capacity_rows)
        weights, indices = weights * within, torch.where(within, indices, -1 - indices)
    if renormalize_after_drop:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * routed_scaling_factor, indices.int()


def _within_capacity(indices: Tensor, experts: int, limit: int) -> Tensor:
    """True for the pairs [tokens, topk] that are among the first ``limit`` of their expert."""
    pairs = indices.flatten()
    order = pairs.argsort(stable=True)
    counts = pairs.bincount(minlength=experts)
    rank = torch.arange(order.numel(), device=order.device) - (counts.cumsum(0) - counts)[pairs[order]]
    return torch.empty_like(order, dtype=torch.bool).scatter_(0, order, rank < limit).view_as(indices)


def _floating(weight: Tensor | QTensor) -> Tensor:
    if isinstance(weight, Tensor):
        return weight
    raise NotImplementedError(f"reference.moe_forward_unfused: floating weights only, got {type(weight).__name__}")


def _swiglu(gate_up: Tensor, limit: float | None) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


def moe_forward_unfused(
    X: Tensor,
    weights: MoEWeights,
    *,
    topk: int,
    capacity: float | None = None,
    ep_group_size: int = 1,
    scoring: Scoring = "softmax",
    renormalize: bool = True,
    renormalize_after_drop: bool = False,
    routed_scaling_factor: float = 1.0,
    n_group: int = 1,
    topk_group: int = 1,
    swiglu_limit: float | None = None,
    token_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    activation_format: str | None = None,
) -> Tensor:
    """Mixture of experts; arguments and result as :func:`ds_flashdmla_moe.moe_forward_unfused`."""
    if ep_group_size != 1 or activation_format is not None:
        raise NotImplementedError("reference.moe_forward_unfused: one process and unquantised activations only")
    x = X.reshape(-1, X.shape[-1])
    experts = weights.gate.shape[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    pair_weights, indices = moe_gate(
        F.linear(x.to(wide), weights.gate.to(wide)),
        topk,
        bias=weights.gate_bias,
        scoring=scoring,
        renormalize=renormalize,
        renormalize_after_drop=renormalize_after_drop,
        routed_scaling_factor=routed_scaling_factor,
        n_group=n_group,
        topk_group=topk_group,
        capacity_rows=None if capacity is None else math.ceil(x.shape[0] * topk / experts * capacity),
        token_ids=None if token_ids is None else token_ids.reshape(-1),
        tid2eid=tid2eid,
    )
    pairs = indices.flatten()
    order = pairs.argsort(stable=True)  # dropped pairs are negative and come first
    counts = pairs.clamp_min(-1).add(1).bincount(minlength=experts + 1).tolist()
    order = order[counts[0] :]
    tokens = order // topk
    # unbind's backward stacks: one pass over the weights' gradient, not one per expert.
    of_experts = zip(
        torch.split(x[tokens], counts[1:]), _floating(weights.w13).unbind(), _floating(weights.w2).unbind(), strict=True
    )
    out = [F.linear(_swiglu(F.linear(rows, w13), swiglu_limit), w2) for rows, w13, w2 in of_experts if rows.shape[0]]
    y = torch.zeros(x.shape, dtype=wide, device=x.device)
    if out:
        y = y.index_add(0, tokens, torch.cat(out).to(wide) * pair_weights.flatten()[order, None])
    if weights.shared_w13 is not None and weights.shared_w2 is not None:
        shared_w13, shared_w2 = _floating(weights.shared_w13), _floating(weights.shared_w2)
        y = y + F.linear(_swiglu(F.linear(x, shared_w13), swiglu_limit), shared_w2)
    return y.to(X.dtype).view_as(X)


moe_megakernel_fwd = moe_forward_unfused
