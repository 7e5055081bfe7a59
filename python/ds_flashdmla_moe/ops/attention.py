# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Dense training attention: softmax attention with grouped heads, and attention through a latent space (DMLA)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._register import accumulator_dtype, adjacent, fake, no_double_backward


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
    """Attention through a latent space of ``d_lat`` dimensions, differentiable.

    On the fly (``cache_is_latent=False``), everything is projected here::

        K_lat = K·WK    V_lat = V·WV    P = softmax(softmax_scale · (Q·WK)·K_latᵀ)    O = (P·V_lat)·WVᵀ

    With ``cache_is_latent=True``, K and V are K_lat and V_lat. WK then projects the queries only (``None``: Q is latent
    already) and WV the output only (``None``: the output stays latent); gradients go to Q, to K_lat and V_lat, and to
    WK and WV for these two uses alone.

    Sums and exponentials are formed in float32 (float64 for float64 tensors) and results rounded once. The score matrix
    never exists as a whole: memory grows with Tq + Tk. Tensors may have any strides; one whose last dimension is not
    adjacent is copied.

    Args:
        Q: ``[B, H, Tq, Dq]``, float64, float32, float16 or bfloat16; the others have its dtype.
        K: ``[B, H, Tk, Dq]``, or ``[B, H, Tk, d_lat]`` when ``cache_is_latent``.
        V: ``[B, H, Tk, Dv]``, or ``[B, H, Tk, d_lat]`` when ``cache_is_latent``.
        WK: ``[Dq, d_lat]``.
        WV: ``[Dv, d_lat]``.
        d_lat: checked against the shapes when given.
        causal: query i sees keys ``j <= i + Tk - Tq``; needs ``Tq <= Tk``.
        cache_is_latent: see above.
        softmax_scale: default ``Dq**-0.5``. A latent Q has lost Dq: pass the scale there to match the other mode.
        return_lse: return also the logarithm of each query's sum of exponentials, which is differentiable, too.
        return_latent: return ``P·V_lat`` instead of O.

    Returns:
        O ``[B, H, Tq, Dv]`` (latent: ``[B, H, Tq, d_lat]``) in Q's dtype and, with ``return_lse``, lse ``[B, H, Tq]``
        float32 (float64 for float64). A query without keys gives 0 and lse −inf.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, a projection is missing, or Tq > Tk with ``causal``.
    """
    if Q.dim() != 4 or K.dim() != 4 or V.dim() != 4:
        raise ValueError(
            "flash_dmla_fwd: Q, K and V must be [B, H, T, D], "
            f"got shapes {list(Q.shape)}, {list(K.shape)} and {list(V.shape)}"
        )
    if not cache_is_latent and (WK is None or WV is None):
        missing = " and ".join(name for name, weight in (("WK", WK), ("WV", WV)) if weight is None)
        raise ValueError(f"flash_dmla_fwd: {missing} must be given unless cache_is_latent=True")
    if d_lat is not None:
        actual = WK.shape[-1] if WK is not None else K.shape[-1]
        if d_lat != actual:
            raise ValueError(f"flash_dmla_fwd: d_lat must be {actual} as in the tensors, got {d_lat}")
    if softmax_scale is None:
        softmax_scale = max(Q.shape[-1], 1) ** -0.5
    project = WV is not None and not return_latent
    out, latent, lse = torch.ops.dsm.flash_dmla(
        adjacent(Q),
        adjacent(K),
        adjacent(V),
        None if WK is None else adjacent(WK),
        None if WV is None else adjacent(WV),
        softmax_scale,
        causal,
        cache_is_latent,
        project,
    )
    result: Tensor = out if project else latent
    return (result, lse) if return_lse else result


def flash_attn(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Softmax attention over a batch of one length, with grouped query heads; differentiable in out and lse.

    ``s_ij = softmax_scale · q_i·k_j``, ``lse_i = log Σ_j exp(s_ij)``, ``out_i = Σ_j exp(s_ij − lse_i) v_j``; query head
    h uses key head ``h // (h_q // h_kv)``. Arithmetic, strides and masking as in :func:`flash_dmla_fwd`, but a causal
    ``s_q > s_kv`` is allowed: the first queries then have no key, output 0 and lse −inf.

    Args:
        q: ``[batch, s_q, h_q, d_qk]``, float64, float32, float16 or bfloat16; the others have its dtype. Tensors in
            ``[batch, heads, s, d]`` order are passed as ``t.transpose(1, 2)`` without a copy.
        k: ``[batch, s_kv, h_kv, d_qk]``, h_q a multiple of h_kv.
        v: ``[batch, s_kv, h_kv, d_v]``.
        softmax_scale: default ``d_qk**-0.5``.
        causal: query i sees keys ``j <= i + s_kv - s_q``.

    Returns:
        out ``[batch, s_q, h_q, d_v]`` in q's dtype and lse ``[batch, h_q, s_q]`` float32 (float64 for float64).

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Source: Dao 2023, arXiv 2307.08691.
    """
    scale = _default_scale("flash_attn", q, softmax_scale)
    return torch.ops.dsm.flash_attn(  # type: ignore[no-any-return]
        adjacent(q), adjacent(k), adjacent(v), None, None, scale, causal
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = True,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over sequences packed one after another, in FlashMLA's signature; differentiable.

    Sequence b has the query rows ``cu_seqlens_qo[b] … cu_seqlens_qo[b+1]`` and the key rows ``cu_seqlens_kv[b] …
    cu_seqlens_kv[b+1]``. Otherwise as :func:`flash_attn`. Rows outside every sequence give 0, lse −inf and gradient 0.

    Args:
        q: ``[T, h, d_qk]``, float64, float32, float16 or bfloat16; the others have its dtype.
        k: ``[T_kv, h_k, d_qk]``, h a multiple of h_k.
        v: ``[T_kv, h_k, d_v]``.
        cu_seqlens_qo: ``[batch + 1]`` int32, not decreasing.
        cu_seqlens_kv: ``[batch + 1]`` int32, not decreasing.
        max_seqlen_qo: accepted for compatibility; the lengths are those of ``cu_seqlens_qo``.
        max_seqlen_kv: likewise.
        dropout_p: must be 0.
        softmax_scale: default ``d_qk**-0.5``.
        causal: query i of a sequence sees its keys ``j <= i + s_kv - s_q``.
        deterministic: both values give the same bits on every run.
        is_varlen: accepted for compatibility; ``cu_seqlens`` hold also for equal lengths.

    Returns:
        out ``[T, h, d_v]`` in q's dtype, and lse ``[T, h]`` float32 (float64 for float64), a transposed view.

    Raises:
        ValueError: a shape, dtype, device or offset does not fit, or dropout is asked for.
    """
    if dropout_p != 0.0:
        raise ValueError(f"flash_attn_varlen_func: dropout_p must be 0 (dropout is not supported), got {dropout_p}")
    scale = _default_scale("flash_attn_varlen_func", q, softmax_scale)
    out, lse = torch.ops.dsm.flash_attn(
        adjacent(q), adjacent(k), adjacent(v), cu_seqlens_qo, cu_seqlens_kv, scale, causal
    )
    return out, lse.transpose(0, 1)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = True,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`flash_attn_varlen_func` of ``qkv`` ``[T, h, 2·head_dim_qk + d_v]``: q, k and v side by side."""
    _check_packed("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 2, head_dim_qk)
    q, k, v = qkv.tensor_split((head_dim_qk, 2 * head_dim_qk), dim=-1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        deterministic,
        is_varlen,
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = True,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`flash_attn_varlen_func` of ``kv`` ``[T_kv, h_k, head_dim_qk + d_v]``: k and v side by side."""
    _check_packed("flash_attn_varlen_kvpacked_func", "kv", kv, 1, head_dim_qk)
    k, v = kv.tensor_split((head_dim_qk,), dim=-1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_qo,
        cu_seqlens_kv,
        max_seqlen_qo,
        max_seqlen_kv,
        dropout_p,
        softmax_scale,
        causal,
        deterministic,
        is_varlen,
    )


def _default_scale(operator: str, q: Tensor, softmax_scale: float | None) -> float:
    if q.dim() < 3:
        raise ValueError(f"{operator}: q must end in [rows, heads, d_qk], got shape {list(q.shape)}")
    return max(q.shape[-1], 1) ** -0.5 if softmax_scale is None else softmax_scale


def _check_packed(operator: str, argument: str, packed: Tensor, parts: int, head_dim_qk: int) -> None:
    if packed.dim() != 3 or not 0 < parts * head_dim_qk <= packed.shape[-1]:
        widths = f"{parts}·head_dim_qk + d_v" if parts > 1 else "head_dim_qk + d_v"
        raise ValueError(
            f"{operator}: {argument} must be [T, heads, {widths}] with head_dim_qk = {head_dim_qk} > 0, "
            f"got shape {list(packed.shape)}"
        )


@fake("flash_attn")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_kv: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    *batch, rows, heads, _ = q.shape
    lse = q.new_empty((*batch, heads, rows), dtype=accumulator_dtype(q))
    return q.new_empty((*batch, rows, heads, v.shape[-1])), lse


@fake("flash_attn_backward")
def _(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_flash_attn(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_kv, ctx.softmax_scale, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens_q, cu_seqlens_kv, *output)
    ctx.set_materialize_grads(False)


def _flash_attn_backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, cu_seqlens_q, cu_seqlens_kv, out, lse = ctx.saved_tensors
    gradients = torch.ops.dsm.flash_attn_backward(
        torch.zeros_like(out) if dout is None else adjacent(dout),
        None if dlse is None else dlse.contiguous(),
        q,
        k,
        v,
        out,
        lse,
        cu_seqlens_q,
        cu_seqlens_kv,
        ctx.softmax_scale,
        ctx.causal,
    )
    return (*gradients, None, None, None, None)


torch.library.register_autograd("dsm::flash_attn", _flash_attn_backward, setup_context=_setup_flash_attn)
no_double_backward("flash_attn_backward")


@fake("flash_dmla")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    wk: Tensor | None,
    wv: Tensor | None,
    softmax_scale: float,
    causal: bool,
    cache_is_latent: bool,
    project_output: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = q.shape[:-1]
    out = q.new_empty((*rows, wv.shape[0])) if project_output and wv is not None else q.new_empty(0)
    latent = q.new_empty((*rows, q.shape[-1] if wk is None else wk.shape[-1]))
    return out, latent, q.new_empty(rows, dtype=accumulator_dtype(q))


@fake("flash_dmla_backward")
def _(
    dout: Tensor | None,
    dlatent: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    wk: Tensor | None,
    wv: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    dwk, dwv = (q.new_empty(0) if weight is None else weight.new_empty(weight.shape) for weight in (wk, wv))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dwk, dwv


def _setup_flash_dmla(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, wk, wv, ctx.softmax_scale, ctx.causal, ctx.cache_is_latent, ctx.project_output = inputs
    _, latent, lse = output
    ctx.save_for_backward(q, k, v, wk, wv, latent, lse)
    ctx.set_materialize_grads(False)


def _flash_dmla_backward(
    ctx: Any, dout: Tensor | None, dlatent: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, wk, wv, latent, lse = ctx.saved_tensors
    dq, dk, dv, dwk, dwv = torch.ops.dsm.flash_dmla_backward(
        None if dout is None or not ctx.project_output else adjacent(dout),
        None if dlatent is None else adjacent(dlatent),
        None if dlse is None else dlse.contiguous(),
        q,
        k,
        v,
        wk,
        wv,
        latent,
        lse,
        ctx.softmax_scale,
        ctx.causal,
        ctx.cache_is_latent,
    )
    return dq, dk, dv, None if wk is None else dwk, None if wv is None else dwv, None, None, None, None


torch.library.register_autograd("dsm::flash_dmla", _flash_dmla_backward, setup_context=_setup_flash_dmla)
no_double_backward("flash_dmla_backward")
