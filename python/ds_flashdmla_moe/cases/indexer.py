# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Cases of the indexer of sparse attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..ops import hadamard_quantize, indexer_kl_loss, indexer_logits, indexer_topk, paged_indexer_logits
from .case import Case, Draw, Function, Sizes, Work

_WIDE = (torch.float64, torch.float32)


def _power_of_two_above(x: Tensor) -> Tensor:
    return x.log2().ceil().exp2()


# --- hadamard_quantize ---


@cache
def _hadamard(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthogonal matrix, by Sylvester's doubling."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < d:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix.mul(d**-0.5).to(device, dtype)


def _rotated(x: Tensor) -> Tensor:
    return x @ _hadamard(x.shape[-1], x.dtype, x.device)


def _hadamard_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    return {"x": draw(sizes["rows"], sizes["d"])}


def _quantize_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    """Small integers, whose rotation is exact: quantised, the least error of it would show as a whole step."""
    return {"x": draw(sizes["rows"], sizes["d"], scale=2).round(), "dtype": draw.dtype}


def _fp4(x: Tensor, dtype: torch.dtype) -> Tensor:
    rotated = _rotated(x).to(dtype).double().unflatten(-1, (-1, 32))  # type: ignore[no-untyped-call]
    scale = _power_of_two_above(rotated.abs().amax(-1, keepdim=True).clamp_min(6 * 2.0**-126) / 6)
    steps = rotated / scale
    # Spacing of E2M1: 0.5 below 2, 1 from 2 to 4, 2 above. torch rounds ties to even multiples: that is even codes.
    spacing = torch.where(steps.abs() < 2, 0.5, torch.where(steps.abs() < 4, 1.0, 2.0))
    values: Tensor = (steps / spacing).round() * spacing * scale
    return values.flatten(-2)


def _fp8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rotated = _rotated(x).to(dtype).double()
    scale = _power_of_two_above(rotated.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 448)
    return (rotated / scale).float().to(torch.float8_e4m3fn), scale.squeeze(-1)


def _hadamard_work(sizes: Sizes, width: int) -> Work:
    """x read, y written; log2(d) sums and a product per element."""
    elements = sizes["rows"] * sizes["d"]
    return Work((math.log2(sizes["d"]) + 1) * elements, 2 * elements * width)


# --- indexer_logits and paged_indexer_logits ---


def _causal_ends(s_q: int, s_kv: int, device: torch.device) -> Tensor:
    """As of the last queries of a sequence with four tokens to a key."""
    position = torch.arange(s_q, device=device) + 4 * s_kv - s_q
    return ((position + 1) // 4).int()


def _logits_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    s_q, s_kv, heads, d = (sizes[name] for name in ("s_q", "s_kv", "heads", "d"))
    return {
        "q": draw(s_q, heads, d),
        "k": draw(s_kv, d),
        "weights": draw(s_q, heads, dtype=draw.wide, scale=(heads * d) ** -0.5),
        "ends": _causal_ends(s_q, s_kv, draw.device),
    }


def _fp8_logits_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    inputs = _logits_inputs(sizes, draw)
    q, q_scale = hadamard_quantize(inputs["q"], "fp8")
    k, k_scale = hadamard_quantize(inputs["k"], "fp8")
    return inputs | {"q": q, "k": k, "weights": inputs["weights"] * q_scale, "k_scale": k_scale}


def _logits_formula(q: Tensor, k: Tensor, weights: Tensor, ends: Tensor, k_scale: Tensor | None = None) -> Tensor:
    scores = torch.einsum("ihd,jd->ihj", q, k).relu()
    logits = torch.einsum("ihj,ih->ij", scores.to(weights.dtype), weights)
    if k_scale is not None:
        logits = logits * k_scale
    return logits.masked_fill(torch.arange(k.shape[0], device=k.device) >= ends[:, None], -math.inf)


def _seen_keys(sizes: Sizes) -> int:
    """Of all queries together."""
    return int(_causal_ends(sizes["s_q"], sizes["s_kv"], torch.device("cpu")).sum())


def _logits_work(sizes: Sizes, width: int) -> Work:
    """q, k and weights read, float32 logits written; per head a dot product, a relu, a product and a sum."""
    s_q, s_kv, heads, d = (sizes[name] for name in ("s_q", "s_kv", "heads", "d"))
    flops = _seen_keys(sizes) * heads * (2 * d + 3)
    return Work(flops, (s_q * heads + s_kv) * d * width + 4 * s_q * (s_kv + heads))


def _logits_backward_work(sizes: Sizes, width: int) -> Work:
    """As forward with the gradients of q, k and weights written; two more products."""
    forward = _logits_work(sizes, width)
    return Work(3 * forward.flops, 2 * forward.bytes)


def _paged_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    batch, s_q, heads, d, pages, page_size = (
        sizes[name] for name in ("batch", "s_q", "heads", "d", "max_pages", "page_size")
    )
    table = torch.arange(batch * pages, device=draw.device, dtype=torch.int32).flip(0).view(batch, pages)
    longest = pages * page_size
    lens = torch.arange(batch * s_q, device=draw.device, dtype=torch.int32).view(batch, s_q) % 3
    return {
        "q": draw(batch, s_q, heads, d),
        "cache": draw(batch * pages, page_size, 1, d),
        "weights": draw(batch, s_q, heads, dtype=draw.wide, scale=(heads * d) ** -0.5),
        "context_lens": longest - lens.clamp_max(longest),
        "block_table": table,
    }


def _fp8_paged_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    inputs = _paged_inputs(sizes, draw)
    q, q_scale = hadamard_quantize(inputs["q"], "fp8")
    k, k_scale = hadamard_quantize(inputs["cache"], "fp8")
    pages = torch.cat((k.view(torch.uint8).flatten(1), k_scale.flatten(1).view(torch.uint8)), 1)
    cache = pages.view(*k.shape[:3], k.shape[3] + 4)
    return inputs | {"q": q, "cache": cache, "weights": inputs["weights"] * q_scale}


def _paged_formula(q: Tensor, cache: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor) -> Tensor:
    page_size, d = cache.shape[1], q.shape[-1]
    if cache.dtype == torch.uint8:
        data, scales = cache.flatten(1).tensor_split((page_size * d,), 1)
        values = data.contiguous().view(torch.float8_e4m3fn).to(weights.dtype).view(-1, page_size, d)
        cache = values * scales.contiguous().view(torch.float32).to(weights.dtype)[..., None]
    keys = cache.view(-1, page_size, d)[block_table.long()].flatten(1, 2)
    scores = torch.einsum("bihd,bjd->bihj", q.to(keys.dtype), keys).relu()
    logits = torch.einsum("bihj,bih->bij", scores.to(weights.dtype), weights)
    return logits.masked_fill(torch.arange(keys.shape[1], device=q.device) >= context_lens[..., None], -math.inf)


def _paged_work(sizes: Sizes, width: int) -> Work:
    """As indexer_logits of every request; all keys are seen."""
    batch, s_q, heads, d, pages, page_size = (
        sizes[name] for name in ("batch", "s_q", "heads", "d", "max_pages", "page_size")
    )
    keys = pages * page_size
    flops = s_q * keys * heads * (2 * d + 3)
    return Work(batch * flops, batch * ((s_q * heads + keys) * d * width + 4 * s_q * (keys + heads)))


# --- indexer_topk ---


def _topk_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    return {"logits": draw(sizes["rows"], sizes["n"]), "topk": sizes["topk"]}


def _ranged_topk_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    """Few different values, so that there are ties, and ranges that are shorter than topk or empty."""
    rows, n = sizes["rows"], sizes["n"]
    row = torch.arange(rows, device=draw.device, dtype=torch.int32)
    inputs = _topk_inputs(sizes, draw)
    return inputs | {"logits": inputs["logits"].round(), "starts": row, "ends": n - row * n // (2 * rows)}


def _topk_formula(logits: Tensor, topk: int, starts: Tensor | None = None, ends: Tensor | None = None) -> Tensor:
    n = logits.shape[1]
    column = torch.arange(n, device=logits.device)
    if starts is not None and ends is not None:
        logits = logits.masked_fill((column < starts[:, None]) | (column >= ends[:, None]), -math.inf)
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    chosen = order.masked_fill(values == -math.inf, n)[:, :topk].sort(-1).values
    return chosen.masked_fill(chosen == n, -1)


def _topk_peers(device: str) -> Mapping[str, Function]:
    return {"torch": lambda logits, topk: logits.topk(topk).indices.sort(-1).values}


def _topk_work(sizes: Sizes, width: int) -> Work:
    """Logits read, int32 indices written; a comparison per logit."""
    rows, n, topk = sizes["rows"], sizes["n"], sizes["topk"]
    return Work(rows * n, rows * (n * width + 4 * topk))


# --- indexer_kl_loss ---


def _kl_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    rows, n, topk = sizes["rows"], sizes["n"], sizes["topk"]
    logits = draw(rows, n, scale=2)
    return {"logits": logits, "target": draw(rows, topk).square(), "indices": indexer_topk(logits.float(), topk)}


def _hidden_kl_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    """Selections of different length, and a row without any."""
    inputs = _kl_inputs(sizes, draw)
    slot = torch.arange(sizes["topk"], device=draw.device)
    row = torch.arange(sizes["rows"], device=draw.device)[:, None]
    return inputs | {"indices": inputs["indices"].masked_fill(slot >= row, -1)}


def _kl_formula(logits: Tensor, target: Tensor, indices: Tensor) -> Tensor:
    hidden = indices < 0
    chosen = logits.gather(1, indices.clamp_min(0).long()).masked_fill(hidden, -1e30)
    target = target.masked_fill(hidden, 0)
    p = target / target.sum(-1, keepdim=True).clamp_min(torch.finfo(target.dtype).tiny)
    return (torch.xlogy(p, p) - p * chosen.log_softmax(-1)).sum(-1)


def _kl_work(sizes: Sizes, width: int) -> Work:
    """Chosen logits, targets and indices read, the loss written; exponential, logarithm and four more per slot."""
    slots = sizes["rows"] * sizes["topk"]
    return Work(6 * slots, slots * (2 * width + 4) + sizes["rows"] * width)


def _kl_backward_work(sizes: Sizes, width: int) -> Work:
    """As forward, with the gradient of all logits written."""
    forward = _kl_work(sizes, width)
    return Work(forward.flops, forward.bytes + sizes["rows"] * sizes["n"] * width)


_QUANTISED = {"rows": 7, "d": 64}
_PAGED = {"batch": 3, "s_q": 2, "heads": 3, "d": 16, "max_pages": 3, "page_size": 5}

CASES = (
    Case(
        operator="hadamard_quantize",
        label="rotation",
        sizes={"rows": 7, "d": 32},
        inputs=_hadamard_inputs,
        run=hadamard_quantize,
        formula=_rotated,
        gradients=("x",),
        backward="hadamard_quantize",
        benchmark={"cpu": ({"rows": 4096, "d": 128},)},
        work=_hadamard_work,
        peers=lambda device: {"torch": _rotated},
    ),
    Case(
        operator="hadamard_quantize",
        label="FP4",
        sizes=_QUANTISED,
        inputs=_quantize_inputs,
        run=lambda x, dtype: hadamard_quantize(x, "fp4"),
        formula=_fp4,
        dtypes=(torch.float32, torch.bfloat16),
    ),
    Case(
        operator="hadamard_quantize",
        label="FP8",
        sizes=_QUANTISED,
        inputs=_quantize_inputs,
        run=lambda x, dtype: hadamard_quantize(x, "fp8"),
        formula=_fp8,
        dtypes=(torch.float32, torch.bfloat16),
    ),
    Case(
        operator="indexer_logits",
        label="causal",
        sizes={"s_q": 9, "s_kv": 37, "heads": 3, "d": 16},
        inputs=_logits_inputs,
        run=indexer_logits,
        formula=_logits_formula,
        gradients=("q", "k", "weights"),
        benchmark={"cpu": ({"s_q": 128, "s_kv": 1024, "heads": 64, "d": 128},)},
        work=_logits_work,
        backward_work=_logits_backward_work,
        peers=lambda device: {"torch": _logits_formula},
    ),
    Case(
        operator="indexer_logits",
        label="FP8",
        sizes={"s_q": 9, "s_kv": 37, "heads": 3, "d": 16},
        inputs=_fp8_logits_inputs,
        run=indexer_logits,
        formula=_logits_formula,
        dtypes=(torch.float32,),
    ),
    Case(
        operator="paged_indexer_logits",
        label="float pages",
        sizes=_PAGED,
        inputs=_paged_inputs,
        run=paged_indexer_logits,
        formula=_paged_formula,
        benchmark={
            "cpu": ({"batch": 8, "s_q": 1, "heads": 64, "d": 128, "max_pages": 32, "page_size": 64},),
        },
        work=_paged_work,
        peers=lambda device: {"torch": _paged_formula},
    ),
    Case(
        operator="paged_indexer_logits",
        label="FP8 pages",
        sizes=_PAGED,
        inputs=_fp8_paged_inputs,
        run=paged_indexer_logits,
        formula=_paged_formula,
        dtypes=(torch.float32,),
    ),
    Case(
        operator="indexer_topk",
        sizes={"rows": 7, "n": 40, "topk": 6},
        inputs=_topk_inputs,
        run=indexer_topk,
        formula=_topk_formula,
        dtypes=(torch.float32,),
        benchmark={"cpu": ({"rows": 64, "n": 16384, "topk": 1024}, {"rows": 1, "n": 1048576, "topk": 2048})},
        work=_topk_work,
        peers=_topk_peers,
    ),
    Case(
        operator="indexer_topk",
        label="ranges with ties",
        sizes={"rows": 7, "n": 20, "topk": 12},
        inputs=_ranged_topk_inputs,
        run=indexer_topk,
        formula=_topk_formula,
        dtypes=(torch.float32,),
    ),
    Case(
        operator="indexer_kl_loss",
        sizes={"rows": 7, "n": 12, "topk": 6},
        inputs=_kl_inputs,
        run=indexer_kl_loss,
        formula=_kl_formula,
        gradients=("logits",),
        dtypes=_WIDE,
        benchmark={"cpu": ({"rows": 256, "n": 4096, "topk": 512},)},
        work=_kl_work,
        backward_work=_kl_backward_work,
        peers=lambda device: {"torch": _kl_formula},
    ),
    Case(
        operator="indexer_kl_loss",
        label="short selections",
        sizes={"rows": 7, "n": 12, "topk": 6},
        inputs=_hidden_kl_inputs,
        run=indexer_kl_loss,
        formula=_kl_formula,
        gradients=("logits",),
        dtypes=_WIDE,
    ),
)
