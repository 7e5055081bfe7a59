# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""FlashMLA's functions under FlashMLA's names, without its limits.

Any number of heads, page size and topk; plain and quantised caches, dense and sparse; float16, bfloat16, float32 and
float64 queries; CPU tensors too. What FlashMLA asserts raises ``ValueError`` here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import torch
from torch import Tensor

from .flash_mla_schedule import decoding_lengths, parts_of, split_requests
from .ops.attention import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from .ops.mla import mla_decode, sparse_mla_decode
from .ops.sparse_mla import sparse_mla_prefill

__all__ = [
    "FlashMLASchedMeta",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]

_BYTES = (torch.uint8, torch.int8, torch.float8_e4m3fn)


@dataclass
class FlashMLASchedMeta:
    """What decoding calls of one shape share; made by :func:`get_mla_metadata`, filled by the first call.

    Attributes:
        have_initialized: whether a call has filled it.
        config: the arguments that later calls must repeat.
        tile_scheduler_metadata: ``[num_sm_parts, 8]`` int32, which blocks of 64 keys of which requests a part computes
            (:func:`ds_flashdmla_moe.flash_mla_schedule.split_requests`). A tensor that is there already is kept. No
            result depends on it.
        num_splits: ``[batch + 1]`` int32, the number of parts that the requests before each are split into.

    Both tensors are made from the first call's lengths when they are first looked at: that reads the lengths on the
    host, which the call itself does not.
    """

    @dataclass
    class Config:
        """The shapes and modes of a call."""

        b: int
        s_q: int
        h_q: int
        page_block_size: int
        h_k: int
        causal: bool
        is_fp8_kvcache: bool
        topk: int | None
        extra_page_block_size: int | None
        extra_topk: int | None

    have_initialized: bool = False
    config: Config | None = None
    tile_scheduler_metadata: Tensor | None = None
    num_splits: Tensor | None = None
    _split: Callable[[], tuple[Tensor, Tensor]] | None = dataclasses.field(
        default=None, init=False, repr=False, compare=False
    )

    def __getattribute__(self, name: str) -> Any:
        if name in ("tile_scheduler_metadata", "num_splits") and self._split is not None:
            split, self._split = self._split, None
            metadata, num_splits = split()
            if self.tile_scheduler_metadata is None:
                self.tile_scheduler_metadata = metadata
            if self.num_splits is None:
                self.num_splits = num_splits
        return super().__getattribute__(name)


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[FlashMLASchedMeta, None]:
    """An empty plan, which the first :func:`flash_mla_with_kvcache` fills, and ``None`` for its ``num_splits``.

    The arguments of older versions, ``(cache_seqlens, heads_per_kv, h_kv, …)``, are accepted; nothing depends on them.
    """
    return FlashMLASchedMeta(), None


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta,
    num_splits: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    out: Tensor | None = None,
    enable_batch_invariant: bool = False,
    *,
    descale_q: Tensor | None = None,
    descale_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decoding over a paged cache: over whole requests (dense) or, with ``indices``, over listed rows (sparse).

    Dense calls are :func:`ds_flashdmla_moe.ops.mla_decode`, sparse ones
    :func:`ds_flashdmla_moe.ops.sparse_mla_decode`: there is the maths, and which caches are taken.

    Args:
        q: ``[batch, s_q, h_q, d_qk]``; dense calls with an FP8 cache also take it in float8_e4m3fn.
        k_cache: ``[pages, page_size, h_kv, d_qk]``, or ``[pages, page_size, 1, bytes]`` for a quantised sparse cache.
        block_table: ``[batch, max_pages]`` int32, for dense calls.
        cache_seqlens: ``[batch]`` int32, for dense calls.
        head_dim_v: d_v.
        tile_scheduler_metadata: from :func:`get_mla_metadata`; for calls of one shape and with the same lengths.
        num_splits: accepted for older callers; the plan holds it.
        softmax_scale: default ``d_qk**-0.5``.
        causal: for dense calls, query i sees keys ``j <= i + cache_seqlens[b] - s_q``.
        is_fp8_kvcache: whether k_cache holds bytes: per-tensor FP8 in dense calls, a quantised format in sparse ones.
        indices: ``[batch, s_q, topk]`` int32, ``page * page_size + entry``; other values are no key.
        attn_sink: ``[h_q]`` float32, for sparse calls.
        extra_k_cache: a second cache for sparse calls.
        extra_indices_in_kvcache: ``[batch, s_q, extra_topk]`` int32, its rows.
        topk_length: ``[batch]`` int32: only the leftmost so many indices count.
        extra_topk_length: the same of ``extra_indices_in_kvcache``.
        out: where the output goes, ``[batch, s_q, h_q, d_v]``.
        enable_batch_invariant: a plan of one part, and a request gives the same bits in every batch.
        descale_q: one float32 that a q in FP8 is multiplied by.
        descale_k: one float32 that a dense FP8 cache is multiplied by.

    Returns:
        out ``[batch, s_q, h_q, d_v]`` in q's dtype (bfloat16 for a q in FP8) and lse ``[batch, h_q, s_q]``, float32,
        natural logarithm. A query without keys gives 0 and lse +inf.

    Raises:
        ValueError: an argument does not fit, or differs from the calls before with the same plan.
    """
    plan = tile_scheduler_metadata
    if not isinstance(plan, FlashMLASchedMeta):
        _refuse("tile_scheduler_metadata must come from get_mla_metadata()", type(plan).__name__)
    if q.dim() != 4:
        _refuse("q must be [batch, s_q, h_q, d_qk]", f"shape {list(q.shape)}")
    if k_cache.dim() != 4:
        _refuse("k_cache must be [pages, page_size, h_kv, d_qk or bytes]", f"shape {list(k_cache.shape)}")
    if is_fp8_kvcache != (k_cache.dtype in _BYTES):
        wanted = "float8_e4m3fn, uint8 or int8 with" if is_fp8_kvcache else "no FP8 cache without"
        _refuse(f"k_cache must be {wanted} is_fp8_kvcache", str(k_cache.dtype))
    result_dtype = torch.bfloat16 if q.dtype == torch.float8_e4m3fn else q.dtype
    shape = (*q.shape[:3], head_dim_v)
    if out is not None and (tuple(out.shape), out.dtype, out.device) != (shape, result_dtype, q.device):
        _refuse(
            f"out must be {list(shape)} {result_dtype} on {q.device}",
            f"{list(out.shape)} {out.dtype} on {out.device}",
        )
    if descale_q is not None and q.dtype != torch.float8_e4m3fn:
        _refuse("descale_q must be None unless q is float8_e4m3fn", f"q in {q.dtype}")
    config = FlashMLASchedMeta.Config(
        b=q.shape[0],
        s_q=q.shape[1],
        h_q=q.shape[2],
        page_block_size=k_cache.shape[1],
        h_k=k_cache.shape[2],
        causal=causal,
        is_fp8_kvcache=is_fp8_kvcache,
        topk=None if indices is None else indices.shape[-1],
        extra_page_block_size=None if extra_k_cache is None else extra_k_cache.shape[1],
        extra_topk=None if extra_indices_in_kvcache is None else extra_indices_in_kvcache.shape[-1],
    )
    _check_config(plan, config)

    if indices is None:
        sparse_only = {
            "attn_sink": attn_sink,
            "extra_k_cache": extra_k_cache,
            "extra_indices_in_kvcache": extra_indices_in_kvcache,
            "topk_length": topk_length,
            "extra_topk_length": extra_topk_length,
        }
        if given := [name for name, value in sparse_only.items() if value is not None]:
            _refuse(f"{' and '.join(given)} must be None without indices", "a tensor")
        if block_table is None or cache_seqlens is None:
            _refuse("block_table and cache_seqlens must be given without indices", "None")
        queries = q
        if q.dtype == torch.float8_e4m3fn:  # bfloat16 holds its values, but not their products with a scale
            queries = q.to(torch.bfloat16) if descale_q is None else q.float() * descale_q
        scale = max(q.shape[-1], 1) ** -0.5 if softmax_scale is None else softmax_scale
        result, lse = mla_decode(
            queries,
            k_cache,
            block_table,
            cache_seqlens,
            head_dim_v,
            softmax_scale=scale,
            causal=causal,
            k_scale=descale_k,
            batch_invariant=enable_batch_invariant,
            out=out if queries.dtype == result_dtype else None,
        )
    else:
        if causal:
            _refuse("causal must be False with indices", "True")
        if descale_q is not None or descale_k is not None:
            _refuse("descale_q and descale_k must be None with indices", "a tensor")
        result, lse = sparse_mla_decode(
            q,
            k_cache,
            indices,
            head_dim_v,
            softmax_scale=softmax_scale,
            attn_sink=attn_sink,
            topk_length=topk_length,
            extra_k_cache=extra_k_cache,
            extra_indices=extra_indices_in_kvcache,
            extra_topk_length=extra_topk_length,
            batch_invariant=enable_batch_invariant,
            out=out,
        )
    if not plan.have_initialized:
        _fill(plan, config, (cache_seqlens, topk_length, extra_topk_length), q.device, enable_batch_invariant)
    if result.dtype != result_dtype:
        result = result.to(result_dtype) if out is None else out.copy_(result)
    return result, lse


def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of every query of a sequence over its own list of keys; differentiable.

    :func:`ds_flashdmla_moe.ops.sparse_mla_prefill` with FlashMLA's arguments; see there.

    Args:
        q: ``[s_q, h_q, d_qk]``.
        kv: ``[s_kv, h_kv, d_qk]``.
        indices: ``[s_q, h_kv, topk]`` int32; below 0 or from s_kv on: no key.
        sm_scale: what scores are multiplied by.
        d_v: columns of a row that are its value.
        attn_sink: ``[h_q]`` float32, a score without a value, in no statistic.
        topk_length: ``[s_q]`` int32: only so many indices of each query count.
        out: written and returned instead of a new tensor.

    Returns:
        out ``[s_q, h_q, d_v]``, max_logits and lse ``[s_q, h_q]`` (natural logarithm). A query without keys gives 0,
        −inf and +inf.

    Raises:
        ValueError: an argument does not fit.
    """
    return sparse_mla_prefill(q, kv, indices, sm_scale, d_v, attn_sink, topk_length, out=out)


def _refuse(expected: str, got: str) -> NoReturn:
    raise ValueError(f"flash_mla_with_kvcache: {expected}, got {got}")


def _check_config(plan: FlashMLASchedMeta, config: FlashMLASchedMeta.Config) -> None:
    if not plan.have_initialized or plan.config is None:
        return
    for field in fields(config):
        before, now = getattr(plan.config, field.name), getattr(config, field.name)
        if before != now:
            raise ValueError(
                f"flash_mla_with_kvcache: the arguments are inconsistent with sched_meta: {field.name} was {before} in "
                f"the first call with it, and is {now} now; call get_mla_metadata() for another shape"
            )


def _fill(
    plan: FlashMLASchedMeta,
    config: FlashMLASchedMeta.Config,
    lengths: tuple[Tensor | None, Tensor | None, Tensor | None],
    device: torch.device,
    one_part: bool,
) -> None:
    """``lengths`` are cache_seqlens, topk_length and extra_topk_length; their present values count."""
    rows = config.s_q * config.h_q // max(config.h_k, 1)
    parts = 1 if one_part else parts_of(device, rows, config.h_k)
    cache_seqlens, topk_length, extra_topk_length = (None if length is None else length.clone() for length in lengths)

    def split() -> tuple[Tensor, Tensor]:
        keys = decoding_lengths(config.b, cache_seqlens, config.topk, topk_length, config.extra_topk, extra_topk_length)
        return split_requests(keys, parts, device)

    plan._split = split
    plan.config, plan.have_initialized = config, True
