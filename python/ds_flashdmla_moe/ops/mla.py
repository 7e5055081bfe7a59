# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Multi-head latent attention over paged caches, for decoding. Not differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._register import accumulator_dtype, adjacent, fake, no_gradient, refuse_out_with_gradients


def mla_decode(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    d_v: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    k_scale: Tensor | None = None,
    batch_invariant: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of new tokens over a paged latent cache: its rows are keys and, in their first ``d_v`` columns, values.

    ``s_ij = softmax_scale · q_i·k_j``, ``lse_i = log Σ_j exp(s_ij)``, ``out_i = Σ_j exp(s_ij − lse_i) k_j[:d_v]``;
    query head h uses key head ``h // (h_q // h_kv)``. Key j of request b is row ``j % page_size`` of page
    ``block_table[b, j // page_size]``; what lies beyond ``cache_seqlens[b]`` is not read. Arithmetic is in float32
    (float64 for a float64 q) with one rounding at the end.

    Args:
        q: ``[batch, s_q, h_q, d_qk]``, float64, float32, float16 or bfloat16.
        k_cache: ``[pages, page_size, h_kv, d_qk]``, any page size, h_q a multiple of h_kv; float32, float16 or
            bfloat16, whichever q has, or float64 beside a float64 q; or in FP8 (float8_e4m3fn, or its bytes as uint8 or
            int8), for any q but float64. Any strides, the last one 1.
        block_table: ``[batch, max_pages]`` int32.
        cache_seqlens: ``[batch]`` int32.
        d_v: at most d_qk.
        softmax_scale: default ``d_qk**-0.5``.
        causal: query i sees keys ``j <= i + cache_seqlens[b] - s_q``.
        k_scale: one float32, by which the elements of an FP8 cache are multiplied; default 1.
        batch_invariant: a request gives the same bits in every batch of up to 4096. GPUs then do not let the other
            requests decide how its keys are shared between multiprocessors, and need longer for few requests.
        out: written and returned instead of a new tensor; any strides, the last one 1.

    Returns:
        out ``[batch, s_q, h_q, d_v]`` in q's dtype and lse ``[batch, h_q, s_q]`` float32 (float64 for float64). A query
        without keys gives 0 and lse +inf.

    Raises:
        ValueError: a shape, dtype or device does not fit, gradients are recorded although out is given or, on the CPU,
            a length lies beyond the table or a page within a length beyond the cache.
    """
    scale = _default_scale("mla_decode", q, softmax_scale)
    inputs = (adjacent(q), k_cache, block_table, cache_seqlens.contiguous(), scale, causal, k_scale, batch_invariant)
    if out is None:
        return torch.ops.dsm.mla_decode(*inputs, d_v)  # type: ignore[no-any-return]
    refuse_out_with_gradients("mla_decode", q, k_cache, k_scale, out)
    _check_out("mla_decode", out, d_v)
    return out, torch.ops.dsm.mla_decode_out(*inputs, out)


def sparse_mla_decode(
    q: Tensor,
    k_cache: Tensor,
    indices: Tensor,
    d_v: int = 512,
    *,
    softmax_scale: float | None = None,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    batch_invariant: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each query over its own list of cached rows, of one cache or of two in one softmax.

    ``s_hj = softmax_scale · q_h·k_j``, ``lse_h = log Σ_j exp(s_hj)``, ``out_h = Σ_j exp(s_hj − lse_h) k_j[:d_v] ·
    sigmoid(lse_h − attn_sink_h)``. An index below 0 or beyond the last row is no key, one that is listed twice counts
    twice, and rows that are not listed have no effect. Arithmetic as in :func:`mla_decode`. On Hopper, where the
    queries of a request name the rows of the caches many times over (a prompt), all rows are dequantised once, into
    memory that is no larger than q and out, beside a copy of the lists.

    Args:
        q: ``[batch, s_q, h_q, d_qk]``, float64, float32, float16 or bfloat16.
        k_cache: ``[pages, page_size, 1, d_qk]`` in float32, float16 or bfloat16, whichever q has, or float64 beside a
            float64 q; or a quantised cache ``[pages, page_size, 1, bytes]`` of uint8, int8 or float8_e4m3fn, told by
            its bytes: 656 (DeepSeek-V3.2) and 352 (the same in NVFP4) with ``d_qk = 576``, 584 (DeepSeek-V4) and 528
            (V4.1) with ``d_qk = 512``. Pages may be any distance apart.
        indices: ``[batch, s_q, topk]`` int32, ``page * page_size + entry``.
        d_v: at most d_qk.
        softmax_scale: default ``d_qk**-0.5``.
        attn_sink: ``[h_q]`` float32 (float64 for float64 q), one more score per head with a zero value, which joins the
            denominator but not lse. −inf is no sink, +inf gives 0.
        topk_length: ``[batch]`` int32, only the leftmost so many indices count; limited to 0 … topk.
        extra_k_cache: a second cache as ``k_cache``, which may also have 288 bytes (V4.1 in FP4), and any page size.
        extra_indices: ``[batch, s_q, extra_topk]`` int32, rows of ``extra_k_cache``.
        extra_topk_length: as ``topk_length``, for ``extra_indices``.
        batch_invariant: as of :func:`mla_decode`.
        out: written and returned instead of a new tensor; any strides, the last one 1.

    Returns:
        out ``[batch, s_q, h_q, d_v]`` in q's dtype and lse ``[batch, h_q, s_q]`` float32 (float64 for float64). A query
        without keys gives 0 and lse +inf.

    Raises:
        ValueError: a shape, dtype, format or device does not fit, or gradients are recorded although out is given.
    """
    scale = _default_scale("sparse_mla_decode", q, softmax_scale)
    inputs = (
        adjacent(q),
        k_cache,
        adjacent(indices),
        None if topk_length is None else topk_length.contiguous(),
        extra_k_cache,
        None if extra_indices is None else adjacent(extra_indices),
        None if extra_topk_length is None else extra_topk_length.contiguous(),
        None if attn_sink is None else attn_sink.contiguous(),
        scale,
        batch_invariant,
    )
    if out is None:
        return torch.ops.dsm.sparse_mla_decode(*inputs, d_v)  # type: ignore[no-any-return]
    refuse_out_with_gradients("sparse_mla_decode", q, k_cache, extra_k_cache, attn_sink, out)
    _check_out("sparse_mla_decode", out, d_v)
    return out, torch.ops.dsm.sparse_mla_decode_out(*inputs, out)


def merge_attention_states(
    outs: Tensor | Sequence[Tensor], lses: Tensor | Sequence[Tensor], attn_sink: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The attention over a set of keys from the attentions over disjoint parts of it, with an optional sink.

    ``lse = log Σ_p exp(lses_p)``, ``out = Σ_p exp(lses_p − lse) outs_p · sigmoid(lse − attn_sink)``. A part whose lse
    is +inf or −inf has no key for that query; its output does not count, whatever it holds.

    Args:
        outs: the parts' outputs, each ``[batch, s_q, h_q, d_v]``: a sequence, or stacked along a first dimension.
        lses: the parts' ``[batch, h_q, s_q]``, natural logarithms, float32 (float64 for float64 outs).
        attn_sink: ``[h_q]``, one more score per head with a zero value, which joins the denominator but not lse. −inf
            is no sink, +inf gives 0.

    Returns:
        out and lse as of one part; a query without keys gives 0 and lse +inf.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    return torch.ops.dsm.merge_attention_states(  # type: ignore[no-any-return]
        adjacent(_stacked("outs", outs)), _stacked("lses", lses), None if attn_sink is None else attn_sink.contiguous()
    )


def _stacked(argument: str, parts: Tensor | Sequence[Tensor]) -> Tensor:
    if isinstance(parts, Tensor):
        return parts
    kinds = {(tuple(part.shape), part.dtype, part.device) for part in parts}
    if len(kinds) != 1:
        shapes = ", ".join(f"{list(part.shape)} {part.dtype} on {part.device}" for part in parts)
        raise ValueError(
            f"merge_attention_states: {argument} must be one or more tensors of one shape, dtype and device, "
            f"got {shapes or 'none'}"
        )
    return torch.stack(tuple(parts))


def _default_scale(operator: str, q: Tensor, softmax_scale: float | None) -> float:
    if q.dim() != 4:
        raise ValueError(f"{operator}: q must be [batch, s_q, h_q, d_qk], got shape {list(q.shape)}")
    return max(q.shape[-1], 1) ** -0.5 if softmax_scale is None else softmax_scale


def _check_out(operator: str, out: Tensor, d_v: int) -> None:
    if out.dim() != 4 or out.shape[-1] != d_v:
        raise ValueError(f"{operator}: out must be [batch, s_q, h_q, d_v = {d_v}], got shape {list(out.shape)}")


def _results(q: Tensor, d_v: int) -> tuple[Tensor, Tensor]:
    batch, s_q, h_q, _ = q.shape
    return q.new_empty((batch, s_q, h_q, d_v)), q.new_empty((batch, h_q, s_q), dtype=accumulator_dtype(q))


@fake("mla_decode")
def _(q: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    return _results(q, inputs[-1])


@fake("mla_decode_out")
def _(q: Tensor, *inputs: Any) -> Tensor:
    return _results(q, 0)[1]


@fake("sparse_mla_decode")
def _(q: Tensor, *inputs: Any) -> tuple[Tensor, Tensor]:
    return _results(q, inputs[-1])


@fake("sparse_mla_decode_out")
def _(q: Tensor, *inputs: Any) -> Tensor:
    return _results(q, 0)[1]


@fake("merge_attention_states")
def _(outs: Tensor, lses: Tensor, attn_sink: Tensor | None) -> tuple[Tensor, Tensor]:
    return _results(outs[0], outs.shape[-1])


for _name in ("mla_decode", "sparse_mla_decode", "merge_attention_states"):
    no_gradient(_name)
