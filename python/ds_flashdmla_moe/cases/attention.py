# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Cases of dense training attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..ops import flash_attn, flash_attn_varlen_func, flash_dmla_fwd
from .case import Case, Draw, Function, Sizes, Work


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """out and lse of [..., rows, d]; the last query sees the last key, and every query here sees at least one."""
    scores = q @ k.transpose(-1, -2) * scale
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(k.shape[-2] - q.shape[-2] + 1)
        scores = scores.masked_fill(hidden, -math.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def _pairs(sizes: Sizes) -> float:
    """Causal (query, key) pairs of one head."""
    s_q, s_kv = sizes["s_q"], sizes["s_kv"]
    return s_q * s_kv - s_q * (s_q - 1) / 2


# --- flash_attn ---


def _flash_attn_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    batch = sizes["batch"]
    return {
        "q": draw(batch, sizes["s_q"], sizes["h_q"], sizes["d_qk"]),
        "k": draw(batch, sizes["s_kv"], sizes["h_kv"], sizes["d_qk"]),
        "v": draw(batch, sizes["s_kv"], sizes["h_kv"], sizes["d_v"]),
    }


def _flash_attn_formula(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, dim=2).transpose(1, 2) for t in (k, v))
    out, lse = _attention(q.transpose(1, 2), k, v, q.shape[-1] ** -0.5, causal=True)
    return out.transpose(1, 2), lse


def _flash_attn_peers(device: str) -> Mapping[str, Function]:
    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return {"sdpa": sdpa}


def _flash_attn_elements(sizes: Sizes) -> float:
    """Of q, k, v and out."""
    queries, keys = sizes["s_q"] * sizes["h_q"], sizes["s_kv"] * sizes["h_kv"]
    return sizes["batch"] * (queries + keys) * (sizes["d_qk"] + sizes["d_v"])


def _flash_attn_work(sizes: Sizes, width: int) -> Work:
    """q, k, v read, out written; scores and output."""
    flops = 2 * sizes["batch"] * sizes["h_q"] * _pairs(sizes) * (sizes["d_qk"] + sizes["d_v"])
    return Work(flops, _flash_attn_elements(sizes) * width)


def _flash_attn_backward_work(sizes: Sizes, width: int) -> Work:
    """q, k, v, out and dout read, dq, dk, dv written; scores, dP, dv, dq, dk."""
    flops = 2 * sizes["batch"] * sizes["h_q"] * _pairs(sizes) * (3 * sizes["d_qk"] + 2 * sizes["d_v"])
    return Work(flops, 2 * _flash_attn_elements(sizes) * width)


# --- flash_attn on packed sequences: lengths s, 1 and s / 2, with as many queries as keys or fewer ---


def _varlen_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    q_lengths, kv_lengths = ((s, 1, s // 2) for s in (sizes["s_q"], sizes["s_kv"]))

    def offsets(lengths: tuple[int, ...]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=draw.device)

    return {
        "q": draw(sum(q_lengths), sizes["h_q"], sizes["d_qk"]),
        "k": draw(sum(kv_lengths), sizes["h_kv"], sizes["d_qk"]),
        "v": draw(sum(kv_lengths), sizes["h_kv"], sizes["d_v"]),
        "cu_seqlens_qo": offsets(q_lengths),
        "cu_seqlens_kv": offsets(kv_lengths),
        "max_seqlen_qo": max(q_lengths),
        "max_seqlen_kv": max(kv_lengths),
        "causal": True,
    }


def _varlen_formula(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_qo: Tensor, cu_seqlens_kv: Tensor, **_: Any
) -> tuple[Tensor, Tensor]:
    q_lengths, kv_lengths = (offsets.diff().tolist() for offsets in (cu_seqlens_qo, cu_seqlens_kv))
    packed = ((q, q_lengths), (k, kv_lengths), (v, kv_lengths))
    sequences = zip(*(torch.split(t, lengths) for t, lengths in packed), strict=True)
    parts = [_flash_attn_formula(*(t[None] for t in sequence)) for sequence in sequences]
    return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0].T for _, lse in parts])


# --- flash_dmla ---


def _flash_dmla_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    lead = sizes["batch"], sizes["heads"]
    return {
        "Q": draw(*lead, sizes["s_q"], sizes["d_qk"]),
        "K": draw(*lead, sizes["s_kv"], sizes["d_qk"]),
        "V": draw(*lead, sizes["s_kv"], sizes["d_v"]),
        **_projections(sizes, draw),
    }


def _latent_cache_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    lead = sizes["batch"], sizes["heads"]
    return {
        "Q": draw(*lead, sizes["s_q"], sizes["d_qk"]),
        "K": draw(*lead, sizes["s_kv"], sizes["d_latent"]),
        "V": draw(*lead, sizes["s_kv"], sizes["d_latent"]),
        **_projections(sizes, draw),
    }


def _projections(sizes: Sizes, draw: Draw) -> dict[str, Tensor]:
    return {
        "WK": draw(sizes["d_qk"], sizes["d_latent"], scale=sizes["d_qk"] ** -0.5),
        "WV": draw(sizes["d_v"], sizes["d_latent"], scale=sizes["d_v"] ** -0.5),
    }


def _flash_dmla(cached: bool) -> Function:
    def run(**inputs: Any) -> Any:
        return flash_dmla_fwd(**inputs, causal=True, cache_is_latent=cached, return_lse=True)

    return run


def _flash_dmla_formula(cached: bool) -> Function:
    def formula(Q: Tensor, K: Tensor, V: Tensor, WK: Tensor, WV: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (K, V) if cached else (K @ WK, V @ WV)
        latent, lse = _attention(Q @ WK, keys, values, Q.shape[-1] ** -0.5, causal=True)
        return latent @ WV.T, lse

    return formula


def _flash_dmla_peers(cached: bool) -> Function:
    def torch_composition(**inputs: Any) -> Any:
        return reference.flash_dmla_fwd(**inputs, causal=True, cache_is_latent=cached)

    return lambda device: {"torch": torch_composition}


def _flash_dmla_work(cached: bool, backward: bool = False) -> Function:
    """Scores and output in latent space and the projections, of which the backward pass makes two products each.

    Forward q, k, v are read and out written; backward also out and dout are read and dq, dk, dv written.
    """

    def work(sizes: Sizes, width: int) -> Work:
        heads, d_qk, d_v, d_latent = (sizes[name] for name in ("heads", "d_qk", "d_v", "d_latent"))
        heads *= sizes["batch"]
        s_q, s_kv = sizes["s_q"], sizes["s_kv"]
        projected = s_q * (d_qk + d_v) + (0 if cached else s_kv * (d_qk + d_v))
        scores = _pairs(sizes) * d_latent
        flops = 2 * heads * ((2 * projected * d_latent + 5 * scores) if backward else projected * d_latent + 2 * scores)
        elements = heads * (s_q * (d_qk + d_v) + s_kv * (2 * d_latent if cached else d_qk + d_v))
        return Work(flops, elements * width * (2 if backward else 1))

    return work


_SMALL_DMLA = {"batch": 2, "heads": 2, "s_q": 9, "s_kv": 13, "d_qk": 16, "d_v": 12, "d_latent": 8}

CASES = (
    Case(
        operator="flash_attn",
        label="causal",
        sizes={"batch": 2, "s_q": 9, "s_kv": 13, "h_q": 4, "h_kv": 2, "d_qk": 24, "d_v": 16},
        inputs=_flash_attn_inputs,
        run=lambda **inputs: flash_attn(**inputs, causal=True),
        formula=_flash_attn_formula,
        gradients=("q", "k", "v"),
        reads_rounded=True,
        benchmark={
            "cpu": (
                {"batch": 8, "s_q": 256, "s_kv": 256, "h_q": 4, "h_kv": 4, "d_qk": 32, "d_v": 32},
                {"batch": 1, "s_q": 2048, "s_kv": 2048, "h_q": 8, "h_kv": 2, "d_qk": 64, "d_v": 64},
            )
        },
        work=_flash_attn_work,
        backward_work=_flash_attn_backward_work,
        peers=_flash_attn_peers,
    ),
    Case(
        operator="flash_attn",
        label="packed sequences",
        sizes={"s_q": 6, "s_kv": 8, "h_q": 4, "h_kv": 2, "d_qk": 16, "d_v": 16},
        inputs=_varlen_inputs,
        run=flash_attn_varlen_func,
        formula=_varlen_formula,
        gradients=("q", "k", "v"),
        reads_rounded=True,
    ),
    Case(
        operator="flash_dmla",
        label="on the fly",
        sizes=_SMALL_DMLA,
        inputs=_flash_dmla_inputs,
        run=_flash_dmla(cached=False),
        formula=_flash_dmla_formula(cached=False),
        gradients=("Q", "K", "V", "WK", "WV"),
        reads_rounded=True,
        benchmark={
            "cpu": (
                {"batch": 8, "heads": 4, "s_q": 256, "s_kv": 256, "d_qk": 32, "d_v": 32, "d_latent": 32},
                {"batch": 1, "heads": 4, "s_q": 2048, "s_kv": 2048, "d_qk": 64, "d_v": 64, "d_latent": 32},
            )
        },
        work=_flash_dmla_work(cached=False),
        backward_work=_flash_dmla_work(cached=False, backward=True),
        peers=_flash_dmla_peers(cached=False),
    ),
    Case(
        operator="flash_dmla",
        label="latent cache",
        sizes=_SMALL_DMLA,
        inputs=_latent_cache_inputs,
        run=_flash_dmla(cached=True),
        formula=_flash_dmla_formula(cached=True),
        gradients=("Q", "K", "V", "WK", "WV"),
        reads_rounded=True,
        benchmark={"cpu": ({"batch": 1, "heads": 8, "s_q": 1, "s_kv": 16384, "d_qk": 64, "d_v": 64, "d_latent": 32},)},
        work=_flash_dmla_work(cached=True),
        peers=_flash_dmla_peers(cached=True),
    ),
)
