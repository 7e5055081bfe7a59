# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Latent attention at the sizes of DeepSeek models in service, on pages in no order, beside FlashMLA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..ops import mla_decode, sparse_mla_decode, sparse_mla_prefill
from . import flash_mla_peer
from .case import Case, Draw, Function, Sizes, Work
from .kv_records import QUANTIZED, V4_FP8, V32_FP8, gather, store, width_of

D_V = 512
DRAWN_ROWS = 1 << 14  # of a cache; the others are copies of them: no kernel is faster or slower for that
FEW_REQUESTS, FEW_QUERIES = 4, 16  # that the truth is computed for


def _attention(
    q: Tensor, keys: Tensor, listed: Tensor, d_v: int, sink: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, largest score and lse of q [..., h, d] over keys [..., n, d]; listed [..., n] is true somewhere."""
    scores = (q @ keys.mT * q.shape[-1] ** -0.5).masked_fill(~listed[..., None, :], -math.inf)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    lse = scores.logsumexp(-1)
    total = lse if sink is None else torch.logaddexp(lse, sink)
    return (scores - total[..., None]).exp().to(q.dtype) @ keys[..., :d_v], scores.amax(-1), lse


def _peers(adapter: Function, formula: Function) -> Function:
    """FlashMLA on a GPU; on the CPU the formula in q's dtype."""
    on_gpu = flash_mla_peer.peers(adapter)
    return lambda device: {"torch": formula} if device == "cpu" else on_gpu(device)


def _few(count: int, most: int) -> Tensor:
    """The first, the last, and some between."""
    return torch.linspace(0, count - 1, min(count, most)).long()


def _distinct(draw: Draw, lists: int, rows: int, topk: int) -> Tensor:
    """[lists, topk] different rows in no order."""
    step = max(1, (1 << 28) // rows)
    parts = [
        draw(min(step, lists - begin), rows, dtype=torch.float32).topk(topk).indices.int()
        for begin in range(0, max(lists, 1), step)
    ]
    return torch.cat(parts)


def _shuffled_pages(draw: Draw, requests: int, pages: int) -> Tensor:
    """A block table [requests, pages]."""
    return draw(requests * pages, dtype=torch.float32).argsort().int().view(requests, pages)


def _repeat(memory: Tensor, filled: int) -> None:
    """Copies the first entries over all others."""
    for begin in range(filled, len(memory), max(filled, 1)):
        memory[begin : begin + filled] = memory[: min(filled, len(memory) - begin)]


# --- mla_decode ---


def _dense_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    batch, page_size = sizes["batch"], sizes["page_size"]
    table = _shuffled_pages(draw, batch, -(-sizes["s_kv"] // page_size))
    filled = min(table.numel(), -(-DRAWN_ROWS // page_size))
    cache = torch.empty(table.numel(), page_size, 1, 576, dtype=draw.dtype, device=draw.device)
    cache[:filled] = draw(filled, page_size, 1, 576)
    _repeat(cache, filled)
    return {
        "q": draw(batch, sizes["s_q"], sizes["h_q"], 576),
        "k_cache": cache,
        "block_table": table,
        "cache_seqlens": torch.full((batch,), sizes["s_kv"], dtype=torch.int32, device=draw.device),
        "d_v": D_V,
    }


def _dense_sample(inputs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Some requests with their pages alone."""
    few = _few(len(inputs["q"]), FEW_REQUESTS)
    table = inputs["block_table"][few]
    own = {
        "q": inputs["q"][few],
        "k_cache": inputs["k_cache"][table.flatten().long()],
        "block_table": torch.arange(table.numel(), dtype=torch.int32, device=table.device).view_as(table),
        "cache_seqlens": inputs["cache_seqlens"][few],
    }
    return few, {**inputs, **own}


def _dense(q: Tensor, k_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, d_v: int) -> tuple[Tensor, Tensor]:
    keys = k_cache[block_table.long()].flatten(1, 3)
    s_q = q.shape[1]
    seen = cache_seqlens[:, None] - torch.arange(s_q - 1, -1, -1, device=q.device)
    listed = torch.arange(keys.shape[1], device=q.device) < seen[..., None]
    out, _, lse = _attention(q, keys[:, None], listed, d_v)
    return out, lse.transpose(1, 2)


def _dense_work(sizes: Sizes, width: int) -> Work:
    """The cache and q read, out written; scores and output."""
    queries = sizes["s_q"] * sizes["h_q"]
    elements = sizes["s_kv"] * 576 + queries * (576 + D_V)
    return Work(2 * sizes["batch"] * queries * sizes["s_kv"] * (576 + D_V), sizes["batch"] * elements * width)


# --- sparse_mla_decode: every request has its own rows; those of ragged cases list up to extra_topk of them ---
# The size of a row counts bytes of a quantised format, or values of draw's dtype.


def _pool(draw: Draw, sizes: Sizes, topk: int, page_size: int, row_size: int) -> tuple[Tensor, Tensor]:
    """A cache and the rows [batch, s_q, topk] that each query has of it.

    Pages of DeepSeek-V4's quantised rows lie a multiple of 576 bytes apart, as FlashMLA wants them.
    """
    batch, s_q = sizes["batch"], sizes["s_q"]
    table = _shuffled_pages(draw, batch, -(-sizes["s_kv"] // page_size))
    filled = min(table.numel(), -(-DRAWN_ROWS // page_size))
    elements = page_size * row_size
    stride = -(-elements // 576) * 576 if row_size == V4_FP8 else elements
    dtype = torch.uint8 if row_size in QUANTIZED else draw.dtype
    memory = torch.zeros(table.numel(), stride, dtype=dtype, device=draw.device)
    cache = memory[:, :elements].view(-1, page_size, 1, row_size)
    drawn = draw(filled * page_size, width_of(row_size), dtype=torch.float32)
    store(cache[:filled], drawn, torch.arange(len(drawn), device=draw.device))
    _repeat(memory, filled)
    chosen = _distinct(draw, batch * s_q, sizes["s_kv"], topk).view(batch, -1).long()
    pages = table.gather(1, chosen // page_size)
    return cache, (pages * page_size + chosen % page_size).int().view(batch, s_q, topk)


def _lengths(sizes: Sizes) -> list[int]:
    """1 … extra_topk, scattered over the requests."""
    return [7919 * request % sizes["extra_topk"] + 1 for request in range(sizes["batch"])]


def _one_cache(row_size: int) -> Function:
    def inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
        cache, indices = _pool(draw, sizes, sizes["topk"], sizes["page_size"], row_size)
        q = draw(sizes["batch"], sizes["s_q"], sizes["h_q"], width_of(row_size))
        return {"q": q, "k_cache": cache, "indices": indices}

    return inputs


def _two_caches(row_size: int) -> Function:
    """The window and the compressed entries, with a sink."""

    def inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
        cache, indices = _pool(draw, sizes, sizes["topk"], sizes["page_size"], row_size)
        extra_cache, extra_indices = _pool(draw, sizes, sizes["extra_topk"], sizes["extra_page_size"], row_size)
        return {
            "q": draw(sizes["batch"], sizes["s_q"], sizes["h_q"], width_of(row_size)),
            "k_cache": cache,
            "indices": indices,
            "attn_sink": draw(sizes["h_q"], dtype=draw.wide),
            "extra_k_cache": extra_cache,
            "extra_indices": extra_indices,
        }

    return inputs


def _ragged_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    lengths = torch.tensor(_lengths(sizes), dtype=torch.int32, device=draw.device)
    return {**_two_caches(V4_FP8)(sizes, draw), "extra_topk_length": lengths}


def _sparse_sample(inputs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Some requests; the formula reads the listed rows only."""
    few = _few(len(inputs["q"]), FEW_REQUESTS)
    of_requests = {"q", "indices", "extra_indices", "extra_topk_length"}
    return few, {name: value[few] if name in of_requests else value for name, value in inputs.items()}


def _listed_rows(cache: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    return gather(cache, indices.flatten(), dtype).view(*indices.shape, -1)


def _sparse(
    q: Tensor,
    k_cache: Tensor,
    indices: Tensor,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    keys = _listed_rows(k_cache, indices, q.dtype)
    listed = torch.ones_like(indices, dtype=torch.bool)
    if extra_k_cache is not None and extra_indices is not None:
        keys = torch.cat((keys, _listed_rows(extra_k_cache, extra_indices, q.dtype)), 2)
        counted = torch.ones_like(extra_indices, dtype=torch.bool)
        if extra_topk_length is not None:
            counted &= torch.arange(counted.shape[2], device=q.device) < extra_topk_length[:, None, None]
        listed = torch.cat((listed, counted), 2)
    out, _, lse = _attention(q, keys, listed, D_V, attn_sink)
    return out, lse.transpose(1, 2)


def _prefill_from_cache(prefill: Function) -> Function:
    """Decoding by a kernel for prompts, which reads plain rows, too: every query is a token of one."""

    def call(q: Tensor, k_cache: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        out, _, lse = prefill(q.flatten(0, 1), k_cache.flatten(0, 1), indices.flatten(0, 1)[:, None], D_V)
        batch_and_s_q = q.shape[:2]
        return out.unflatten(0, batch_and_s_q), lse.unflatten(0, batch_and_s_q).transpose(1, 2)

    return call


def _sparse_work(row_size: int, ragged: bool = False) -> Function:
    """Listed rows, each once, and q read, out written; scores and output."""

    def work(sizes: Sizes, width: int) -> Work:
        batch, s_q, widths = sizes["batch"], sizes["s_q"], width_of(row_size) + D_V
        row_bytes = row_size if row_size in QUANTIZED else row_size * width
        extra = _lengths(sizes) if ragged else [sizes.get("extra_topk", 0)] * batch
        counts = [count for more in extra for count in (sizes["topk"], more)]
        rows = sum(min(s_q * count, sizes["s_kv"]) for count in counts)
        flops = 2 * s_q * sizes["h_q"] * sum(counts) * widths
        return Work(flops, rows * row_bytes + batch * s_q * sizes["h_q"] * widths * width)

    return work


# --- sparse_mla_decode, a prompt: one request, whose positions are the first dimension here ---


def _prompt_inputs(row_bytes: int) -> Function:
    def inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
        cache, indices = _pool(draw, {**sizes, "batch": 1}, sizes["topk"], sizes["page_size"], row_bytes)
        return {"q": draw(sizes["s_q"], sizes["h_q"], width_of(row_bytes)), "k_cache": cache, "indices": indices[0]}

    return inputs


def _of_prompt(decode: Function) -> Function:
    def call(q: Tensor, k_cache: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = decode(q=q[None], k_cache=k_cache, indices=indices[None])
        return out[0], lse[0].T

    return call


def _prefill_of_dequantized() -> Function:
    """Rows are dequantised by the first call, as for the layers that share them."""
    rows: list[Tensor] = []

    def call(q: Tensor, k_cache: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        if not rows:
            every = torch.arange(k_cache.shape[0] * k_cache.shape[1], device=q.device)
            rows.append(gather(k_cache, every, q.dtype)[:, None])
        out, _, lse = sparse_mla_prefill(q, rows[0], indices[:, None], d_v=D_V)
        return out, lse

    return call


def _prompt_peers(device: str) -> Mapping[str, Function]:
    on_prompt = _peers(lambda module: _of_prompt(flash_mla_peer.sparse_decode(module)), _of_prompt(_sparse))
    ours = {"sparse_mla_prefill": _prefill_of_dequantized()} if device == "cuda" else {}
    return {**on_prompt(device), **ours}


def _prompt_work(row_bytes: int) -> Function:
    work = _sparse_work(row_bytes)
    return lambda sizes, width: work({**sizes, "batch": 1}, width)


# --- sparse_mla_prefill ---


def _prefill_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    return {
        "q": draw(sizes["s_q"], sizes["h_q"], sizes["d_qk"]),
        "kv": draw(sizes["s_kv"], 1, sizes["d_qk"]),
        "indices": _distinct(draw, sizes["s_q"], sizes["s_kv"], sizes["topk"])[:, None],
        "d_v": sizes["d_v"],
    }


def _prefill_sample(inputs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    few = _few(len(inputs["q"]), FEW_QUERIES)
    return few, {**inputs, "q": inputs["q"][few], "indices": inputs["indices"][few]}


def _prefill(q: Tensor, kv: Tensor, indices: Tensor, d_v: int) -> tuple[Tensor, ...]:
    return _attention(q, kv[indices[:, 0].long(), 0], torch.ones_like(indices[:, 0], dtype=torch.bool), d_v)


def _prefill_work(sizes: Sizes, width: int) -> Work:
    """q and the listed rows of kv, each once, read, out written; scores and output."""
    queries, widths = sizes["s_q"] * sizes["h_q"], sizes["d_qk"] + sizes["d_v"]
    rows = min(sizes["s_kv"], sizes["s_q"] * sizes["topk"])
    return Work(2 * queries * sizes["topk"] * widths, (queries * widths + rows * sizes["d_qk"]) * width)


def _dense_row(batch: int, h_q: int, s_kv: int, s_q: int = 1) -> Sizes:
    return {"batch": batch, "h_q": h_q, "s_q": s_q, "s_kv": s_kv, "page_size": 64}


def _v32_row(batch: int, h_q: int) -> Sizes:
    return {"batch": batch, "h_q": h_q, "s_q": 1, "s_kv": 32768, "topk": 2048, "page_size": 64}


def _v4_row(batch: int, h_q: int, extra_topk: int, extra_page_size: int = 64) -> Sizes:
    pages = {"page_size": 256, "extra_page_size": extra_page_size}
    return {"batch": batch, "h_q": h_q, "s_q": 1, "s_kv": 16384, "topk": 128, "extra_topk": extra_topk, **pages}


def _prompt_row(h_q: int, topk: int, s_kv: int) -> Sizes:
    return {"h_q": h_q, "s_q": 4096, "s_kv": s_kv, "topk": topk, "page_size": 64}


def _prefill_row(h_q: int, d_qk: int, topk: int, s_kv: int = 8192) -> Sizes:
    return {"s_q": 4096, "h_q": h_q, "d_qk": d_qk, "d_v": D_V, "topk": topk, "s_kv": s_kv}


_V32 = Case(
    operator="sparse_mla_decode",
    label="DeepSeek-V3.2 FP8 cache (FlashMLA padded to 64 heads)",
    sizes={"batch": 2, "h_q": 3, "s_q": 2, "s_kv": 13, "topk": 9, "page_size": 4},
    inputs=_one_cache(V32_FP8),
    sample=_sparse_sample,
    run=sparse_mla_decode,
    formula=_sparse,
    rounds_probabilities=True,
    dtypes=(torch.bfloat16,),
    benchmark={"cuda": (_v32_row(2, 128), _v32_row(64, 128), _v32_row(128, 128), _v32_row(128, 64), _v32_row(128, 16))},
    replayed=True,
    work=_sparse_work(V32_FP8),
    peers=_peers(flash_mla_peer.sparse_decode, _sparse),
)

_V4 = replace(
    _V32,
    label="DeepSeek-V4 FP8 caches (FlashMLA padded to 64 heads)",
    sizes={**_V32.sizes, "extra_topk": 12, "extra_page_size": 2},
    inputs=_two_caches(V4_FP8),
    benchmark={
        "cuda": (
            *(_v4_row(batch, 64, 512) for batch in (2, 16, 64, 128, 148)),
            *(_v4_row(batch, 128, 1024) for batch in (64, 128)),
            _v4_row(128, 16, 512),
        )
    },
    work=_sparse_work(V4_FP8),
)

_PLAIN = replace(
    _V32,
    label="plain bfloat16 cache (FlashMLA's prefill, padded to 64 heads)",
    inputs=_one_cache(576),
    benchmark={"cuda": tuple(_v32_row(batch, h_q) for batch in (2, 64, 128) for h_q in (16, 64, 128))},
    work=_sparse_work(576),
    peers=_peers(lambda module: _prefill_from_cache(flash_mla_peer.sparse_prefill(module)), _sparse),
)

_TWO_PLAIN = replace(
    _V4,
    label="plain bfloat16 caches",
    inputs=_two_caches(512),
    benchmark={"cuda": tuple(_v4_row(batch, h_q, 512) for batch in (2, 64, 128) for h_q in (16, 64, 128))},
    work=_sparse_work(512),
    peers=lambda device: {"torch": _sparse} if device == "cpu" else {},
)

_V32_PROMPT = replace(
    _V32,
    label="a prompt on DeepSeek-V3.2's FP8 cache (sparse_mla_prefill: on dequantised rows)",
    sizes={"h_q": 3, "s_q": 5, "s_kv": 13, "topk": 9, "page_size": 4},
    inputs=_prompt_inputs(V32_FP8),
    run=_of_prompt(sparse_mla_decode),
    formula=_of_prompt(_sparse),
    benchmark={"cuda": (_prompt_row(128, 2048, 8192), _prompt_row(128, 2048, 131072))},
    work=_prompt_work(V32_FP8),
    peers=_prompt_peers,
)

CASES = (
    Case(
        operator="mla_decode",
        label="DeepSeek-V3",
        sizes={"batch": 3, "h_q": 4, "s_q": 2, "s_kv": 13, "page_size": 4},
        inputs=_dense_inputs,
        sample=_dense_sample,
        run=lambda **inputs: mla_decode(**inputs, causal=True),
        formula=_dense,
        rounds_probabilities=True,
        dtypes=(torch.float16, torch.bfloat16),
        benchmark={
            "cuda": (
                _dense_row(2, 16, 8192),
                _dense_row(4, 128, 8192),
                _dense_row(1, 16, 65536),
                _dense_row(1, 128, 65536),
                _dense_row(64, 16, 16384),
                _dense_row(64, 64, 16384),
                _dense_row(128, 128, 4096),
                _dense_row(128, 128, 8192),
                _dense_row(128, 128, 4096, s_q=2),
                _dense_row(128, 128, 8192, s_q=2),
            )
        },
        replayed=True,
        work=_dense_work,
        peers=_peers(flash_mla_peer.dense_decode, _dense),
    ),
    _V4,
    replace(
        _V4,
        label="DeepSeek-V4 FP8 caches, 1 to extra_topk extra rows",
        sizes={**_V4.sizes, "s_kv": 12, "extra_topk": 12},
        inputs=_ragged_inputs,
        benchmark={
            "cuda": tuple(_v4_row(batch, h_q, 8 * h_q, 2) for h_q in (64, 128) for batch in (64, 128)),
        },
        work=_sparse_work(V4_FP8, ragged=True),
    ),
    _V32,
    _PLAIN,
    _TWO_PLAIN,
    _V32_PROMPT,
    replace(
        _V32_PROMPT,
        label="a prompt on DeepSeek-V4's FP8 cache (sparse_mla_prefill: on dequantised rows)",
        inputs=_prompt_inputs(V4_FP8),
        benchmark={"cuda": (_prompt_row(64, 512, 8192),)},
        work=_prompt_work(V4_FP8),
    ),
    Case(
        operator="sparse_mla_prefill",
        label="DeepSeek-V3.2 and V4 (FlashMLA padded to 64 heads)",
        sizes={"s_q": 5, "h_q": 4, "d_qk": 40, "d_v": 32, "topk": 9, "s_kv": 17},
        inputs=_prefill_inputs,
        sample=_prefill_sample,
        run=sparse_mla_prefill,
        formula=_prefill,
        rounds_probabilities=True,
        dtypes=(torch.bfloat16,),
        benchmark={
            "cuda": (
                _prefill_row(64, 512, 512),
                _prefill_row(16, 576, 2048),
                *(_prefill_row(128, 576, 2048, s_kv) for s_kv in (8192, 32768, 131072)),
            )
        },
        replayed=True,
        work=_prefill_work,
        peers=_peers(flash_mla_peer.sparse_prefill, _prefill),
    ),
)
