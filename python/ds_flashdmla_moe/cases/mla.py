# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Cases of latent attention over paged caches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops import merge_attention_states, mla_decode, sparse_mla_decode
from .case import Case, Draw, Function, Sizes, Work


def _softmax(scores: Tensor, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Probabilities and lse of scores [..., h_q, keys], of which every row has a finite one; sink [h_q]."""
    lse = scores.logsumexp(-1)
    p = (scores - lse[..., None]).exp()
    return p if sink is None else p * torch.sigmoid(lse - sink)[..., None], lse


# --- mla_decode: the last requests are shorter, the pages in reverse order ---


def _decode_inputs(cache_dtype: torch.dtype | None = None) -> Function:
    """With a cache of that dtype, by default of the queries'."""
    fp8 = cache_dtype == torch.float8_e4m3fn

    def inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
        batch, page_size, d_qk = sizes["batch"], sizes["page_size"], sizes["d_qk"]
        max_pages = -(-sizes["s_kv"] // page_size)
        pages = torch.arange(batch * max_pages, dtype=torch.int32, device=draw.device)
        cache = draw(batch * max_pages, page_size, sizes["h_kv"], d_qk)
        lengths = torch.arange(sizes["s_kv"], sizes["s_kv"] - batch, -1, dtype=torch.int32, device=draw.device)
        return {
            "q": draw(batch, sizes["s_q"], sizes["h_q"], d_qk),
            "k_cache": cache.to(cache_dtype or draw.dtype),
            "block_table": pages.flip(0).reshape(batch, max_pages),
            "cache_seqlens": lengths,
            "d_v": sizes["d_v"],
            "k_scale": torch.tensor(0.75, device=draw.device) if fp8 else None,
        }

    return inputs


def _decode_scores(q: Tensor, rows: Tensor, cache_seqlens: Tensor) -> Tensor:
    """Causal scores [batch, h_kv, s_q, group, s_kv] of rows [batch, s_kv, h_kv, d_qk]."""
    batch, s_q, _, d_qk = q.shape
    h_kv = rows.shape[2]
    grouped = q.reshape(batch, s_q, h_kv, -1, d_qk).transpose(1, 2).flatten(2, 3)
    scores: Tensor = (grouped @ rows.permute(0, 2, 3, 1) * d_qk**-0.5).reshape(batch, h_kv, s_q, -1, rows.shape[1])
    if s_q == 1 and int(cache_seqlens.min()) == rows.shape[1]:
        return scores
    seen = cache_seqlens[:, None] - torch.arange(s_q - 1, -1, -1, device=q.device)
    hidden = torch.arange(rows.shape[1], device=q.device) >= seen[:, None, :, None, None]
    return scores.masked_fill(hidden, -math.inf)


def _decode_rows(k_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> Tensor:
    return k_cache[block_table.long()].flatten(1, 2)[:, : int(cache_seqlens.max())]


def _decode_formula(
    q: Tensor, k_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, d_v: int, k_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows = _decode_rows(k_cache if k_scale is None else k_cache * k_scale, block_table, cache_seqlens)
    p, lse = _softmax(_decode_scores(q, rows, cache_seqlens))
    out = torch.einsum("bgihs,bsgd->bighd", p, rows[..., :d_v])
    return out.flatten(2, 3), lse.transpose(2, 3).flatten(1, 2)


def _decode_peers(device: str) -> Mapping[str, Function]:
    def torch_composition(
        q: Tensor, k_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, d_v: int, k_scale: Tensor | None
    ) -> Tensor:
        rows = _decode_rows(k_cache, block_table, cache_seqlens)
        if k_scale is not None:
            rows = (rows.float() * k_scale).to(q.dtype)
        p = _decode_scores(q, rows, cache_seqlens).softmax(-1)
        out = p.flatten(2, 3) @ rows[..., :d_v].transpose(1, 2)
        return out.reshape(*p.shape[:4], d_v).transpose(1, 2).flatten(2, 3)

    return {"torch": torch_composition}


def _decode_work(fp8: bool) -> Function:
    """The cache and q read, out written; scores and output."""

    def work(sizes: Sizes, width: int) -> Work:
        batch, queries = sizes["batch"], sizes["s_q"] * sizes["h_q"]
        both = sizes["d_qk"] + sizes["d_v"]
        cache = sizes["s_kv"] * sizes["h_kv"] * sizes["d_qk"] * (1 if fp8 else width)
        return Work(2 * batch * queries * sizes["s_kv"] * both, batch * (cache + queries * both * width))

    return work


# --- sparse_mla_decode ---


def _lists(sizes: Sizes, draw: Draw, topk: int, rows: int) -> Tensor:
    """Rows in a scattered order, the last one of each list absent."""
    batch, s_q = sizes["batch"], sizes["s_q"]
    order = torch.arange(batch * s_q * topk, device=draw.device).reshape(batch, s_q, topk) * 7919 % rows
    order[..., -1] = -1
    return order.int()


def _plain_inputs(cache_dtype: torch.dtype | None = None) -> Function:
    """With a cache of that dtype, by default of the queries'."""

    def inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
        cache = draw(sizes["pages"], sizes["page_size"], 1, sizes["d_qk"])
        return {
            "q": draw(sizes["batch"], sizes["s_q"], sizes["h_q"], sizes["d_qk"]),
            "k_cache": cache.to(cache_dtype or draw.dtype),
            "indices": _lists(sizes, draw, sizes["topk"], sizes["pages"] * sizes["page_size"]),
            "d_v": sizes["d_v"],
        }

    return inputs


def _v4_cache(draw: Draw, pages: int, page_size: int) -> Tensor:
    """DeepSeek-V4's 584 bytes per row: a page is all rows' data, then all rows' scales."""
    elements = draw(pages, page_size, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    rotary = draw(pages, page_size, 64, dtype=torch.bfloat16).view(torch.uint8)
    scales = torch.arange(pages * page_size * 8, dtype=torch.uint8, device=draw.device) % 4 + 125
    data = torch.cat((elements, rotary), -1).flatten(1)
    return torch.cat((data, scales.reshape(pages, -1)), -1).reshape(pages, page_size, 1, 584)


def _v4_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    """The window in pages of page_size, compressed entries in pages of 2, and a sink."""
    pages, page_size = sizes["pages"], sizes["page_size"]
    return {
        "q": draw(sizes["batch"], sizes["s_q"], sizes["h_q"], 512),
        "k_cache": _v4_cache(draw, pages, page_size),
        "indices": _lists(sizes, draw, sizes["topk"], pages * page_size),
        "attn_sink": draw(sizes["h_q"], dtype=draw.wide),
        "extra_k_cache": _v4_cache(draw, pages, 2),
        "extra_indices": _lists(sizes, draw, sizes["topk"], pages * 2),
    }


def _rows(cache: Tensor, dtype: torch.dtype) -> Tensor:
    """All rows of a plain cache, or of one in DeepSeek-V4's format."""
    if cache.dtype != torch.uint8:
        return cache.flatten(0, 2)
    page_size = cache.shape[1]
    data, scales = cache.flatten(1).tensor_split((page_size * 576,), dim=1)
    data = data.reshape(-1, 576)
    elements = data[:, :448].contiguous().view(torch.float8_e4m3fn).to(dtype)
    powers = torch.exp2(scales.reshape(-1, 8)[:, :7].to(dtype) - 127).repeat_interleave(64, 1)
    return torch.cat((elements * powers, data[:, 448:].contiguous().view(torch.bfloat16).to(dtype)), 1)


def _sparse(
    q: Tensor,
    k_cache: Tensor,
    indices: Tensor,
    d_v: int = 512,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The formula in q's dtype, which is also the peer: gathered rows, two products, softmax."""
    rows, listed = _gather(k_cache, indices, q.dtype)
    if extra_k_cache is not None and extra_indices is not None:
        more, more_listed = _gather(extra_k_cache, extra_indices, q.dtype)
        rows, listed = torch.cat((rows, more), 2), torch.cat((listed, more_listed), 2)
    scores = (q @ rows.mT * q.shape[-1] ** -0.5).masked_fill(~listed[:, :, None], -math.inf)
    p, lse = _softmax(scores.to(torch.promote_types(q.dtype, torch.float32)), attn_sink)
    return p.to(q.dtype) @ rows[..., :d_v], lse.transpose(1, 2)


def _gather(cache: Tensor, indices: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = _rows(cache, dtype)
    listed = (indices >= 0) & (indices < len(rows))
    return rows[torch.where(listed, indices, 0).long()], listed


def _sparse_work(row_bytes: int, pools: int) -> Function:
    """Listed rows (each once) and q read, out written; scores and output. row_bytes 0: d_qk elements of q's dtype."""

    def work(sizes: Sizes, width: int) -> Work:
        d_qk, d_v, topk = sizes.get("d_qk", 512), sizes.get("d_v", 512), sizes["topk"]
        queries = sizes["batch"] * sizes["s_q"]
        flops = 2 * queries * sizes["h_q"] * pools * topk * (d_qk + d_v)
        page_sizes = (sizes["page_size"], 2)[:pools]
        rows = sum(min(queries * topk, sizes["pages"] * page_size) for page_size in page_sizes)
        return Work(flops, rows * (row_bytes or d_qk * width) + queries * sizes["h_q"] * (d_qk + d_v) * width)

    return work


# --- merge_attention_states: the second part of the first request has no keys ---


def _merge_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    parts, batch, s_q, h_q = (sizes[name] for name in ("parts", "batch", "s_q", "h_q"))
    lses = draw(parts, batch, h_q, s_q, dtype=draw.wide, scale=3)
    lses[1, 0] = math.inf
    return {
        "outs": draw(parts, batch, s_q, h_q, sizes["d_v"]),
        "lses": lses,
        "attn_sink": draw(h_q, dtype=draw.wide),
    }


def _merge(outs: Tensor, lses: Tensor, attn_sink: Tensor) -> tuple[Tensor, Tensor]:
    p, lse = _softmax(lses.masked_fill(lses == math.inf, -math.inf).permute(1, 3, 2, 0), attn_sink)
    return torch.einsum("bihp,pbihd->bihd", p.to(outs.dtype), outs), lse.transpose(1, 2)


def _merge_work(sizes: Sizes, width: int) -> Work:
    """Outputs read, one written; a product and a sum for every element."""
    elements = sizes["batch"] * sizes["s_q"] * sizes["h_q"] * sizes["d_v"]
    return Work(2 * sizes["parts"] * elements, (sizes["parts"] + 1) * elements * width)


_HALF_AND_FLOAT = (torch.float32, torch.float16, torch.bfloat16)
_SMALL_DECODE = {"batch": 3, "s_q": 2, "s_kv": 13, "h_q": 4, "h_kv": 2, "d_qk": 24, "d_v": 16, "page_size": 4}
_MLA = {"batch": 4, "s_q": 1, "s_kv": 1024, "h_kv": 1, "d_qk": 576, "d_v": 512, "page_size": 64}
_SMALL_SPARSE = {"batch": 2, "s_q": 2, "h_q": 3, "topk": 9, "d_qk": 24, "d_v": 16, "pages": 5, "page_size": 4}
_SPARSE = {"batch": 4, "s_q": 1, "topk": 512, "d_qk": 576, "d_v": 512, "pages": 64, "page_size": 64}

CASES = (
    Case(
        operator="mla_decode",
        label="cache of the queries' dtype",
        sizes=_SMALL_DECODE,
        inputs=_decode_inputs(),
        run=lambda **inputs: mla_decode(**inputs, causal=True),
        formula=_decode_formula,
        rounds_probabilities=True,
        benchmark={"cpu": ({**_MLA, "h_q": 16}, {**_MLA, "h_q": 128}), "cuda": ({**_MLA, "h_q": 16},)},
        work=_decode_work(fp8=False),
        peers=_decode_peers,
    ),
    Case(
        operator="mla_decode",
        label="bfloat16 cache",
        sizes=_SMALL_DECODE,
        inputs=_decode_inputs(torch.bfloat16),
        run=lambda **inputs: mla_decode(**inputs, causal=True),
        formula=_decode_formula,
        rounds_probabilities=True,
    ),
    Case(
        operator="mla_decode",
        label="FP8 cache",
        sizes=_SMALL_DECODE,
        inputs=_decode_inputs(torch.float8_e4m3fn),
        run=lambda **inputs: mla_decode(**inputs, causal=True),
        formula=_decode_formula,
        rounds_probabilities=True,
        dtypes=_HALF_AND_FLOAT,
        benchmark={
            "cpu": ({**_MLA, "h_q": 16},),
            "cuda": ({**_MLA, "h_q": 16}, {**_MLA, "batch": 64, "s_kv": 16384, "h_q": 16}),
        },
        work=_decode_work(fp8=True),
        peers=_decode_peers,
    ),
    Case(
        operator="sparse_mla_decode",
        label="cache of the queries' dtype",
        sizes=_SMALL_SPARSE,
        inputs=_plain_inputs(),
        run=sparse_mla_decode,
        formula=_sparse,
        rounds_probabilities=True,
        benchmark={
            "cpu": ({**_SPARSE, "h_q": 16}, {**_SPARSE, "h_q": 128}),
            "cuda": ({**_SPARSE, "h_q": 16}, {**_SPARSE, "batch": 64, "h_q": 64, "topk": 2048, "pages": 4096}),
        },
        work=_sparse_work(0, pools=1),
        peers=lambda device: {"torch": _sparse},
    ),
    Case(
        operator="sparse_mla_decode",
        label="bfloat16 cache",
        sizes=_SMALL_SPARSE,
        inputs=_plain_inputs(torch.bfloat16),
        run=sparse_mla_decode,
        formula=_sparse,
        rounds_probabilities=True,
    ),
    Case(
        operator="sparse_mla_decode",
        label="two caches of DeepSeek-V4",
        sizes={"batch": 2, "s_q": 2, "h_q": 3, "topk": 9, "pages": 5, "page_size": 4},
        inputs=_v4_inputs,
        run=sparse_mla_decode,
        formula=_sparse,
        rounds_probabilities=True,
        benchmark={
            "cpu": ({"batch": 4, "s_q": 1, "h_q": 64, "topk": 128, "pages": 64, "page_size": 64},),
            "cuda": ({"batch": 4, "s_q": 1, "h_q": 64, "topk": 128, "pages": 64, "page_size": 64},),
        },
        work=_sparse_work(584, pools=2),
        peers=lambda device: {"torch": _sparse},
    ),
    Case(
        operator="merge_attention_states",
        sizes={"parts": 3, "batch": 2, "s_q": 2, "h_q": 3, "d_v": 20},
        inputs=_merge_inputs,
        run=merge_attention_states,
        formula=_merge,
        benchmark={
            "cpu": ({"parts": 2, "batch": 32, "s_q": 1, "h_q": 128, "d_v": 512},),
            "cuda": (
                {"parts": 2, "batch": 16, "s_q": 1, "h_q": 128, "d_v": 512},
                {"parts": 2, "batch": 512, "s_q": 2, "h_q": 128, "d_v": 512},
                {"parts": 32, "batch": 16, "s_q": 2, "h_q": 128, "d_v": 512},
            ),
        },
        work=_merge_work,
        peers=lambda device: {"torch": _merge},
    ),
)
