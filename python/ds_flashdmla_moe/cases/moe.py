# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Cases of the mixture of experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import grouped_gemm, moe_combine, moe_ffn, moe_gate, moe_permute, swiglu
from ..quant import MXFP4Tensor, QTensor, fp8_block_quantize, mxfp4_quantize
from .case import Case, Draw, Function, Sizes, Work


def _routing(sizes: Sizes, draw: Draw) -> Tensor:
    """Different random experts for each token; every ninth token's last pair is dropped."""
    indices = draw(sizes["tokens"], sizes["experts"]).topk(sizes["topk"]).indices.int()
    indices[::9, -1] = -1 - indices[::9, -1]
    return indices


def _pair_weights(sizes: Sizes, draw: Draw) -> Tensor:
    return draw(sizes["tokens"], sizes["topk"], dtype=draw.wide).sigmoid()


def _offsets(indices: Tensor, experts: int) -> Tensor:
    """[experts + 1]: where each expert's rows begin, counted from the routing."""
    counts = (indices.flatten()[None] == torch.arange(experts, device=indices.device)[:, None]).sum(-1)
    return F.pad(counts.cumsum(0), (1, 0)).int()


def _visited(sizes: Sizes) -> int:
    """Experts that can have a token at all."""
    return min(sizes["experts"], sizes["tokens"] * sizes["topk"])


# --- moe_gate ---


def _gate_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    return {"logits": draw(sizes["tokens"], sizes["experts"]), "topk": sizes["topk"]}


def _grouped_gate_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    """DeepSeek-V3's gate, with a capacity that drops about a quarter of the pairs."""
    tokens, experts, topk = sizes["tokens"], sizes["experts"], sizes["topk"]
    return {
        "logits": draw(tokens, experts),
        "topk": topk,
        "bias": draw(experts, dtype=torch.float32, scale=0.3),
        "scoring": "sigmoid",
        "renormalize_after_drop": True,
        "routed_scaling_factor": 2.5,
        "n_group": 4,
        "topk_group": 2,
        "capacity_rows": max(1, 3 * tokens * topk // (4 * experts)),
    }


def _gate_formula(
    logits: Tensor,
    topk: int,
    bias: Tensor | None = None,
    scoring: str = "softmax",
    renormalize_after_drop: bool = False,
    routed_scaling_factor: float = 1.0,
    n_group: int = 1,
    topk_group: int = 1,
    capacity_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    experts = logits.shape[-1]
    scores = logits.softmax(-1) if scoring == "softmax" else logits.sigmoid()
    choice = scores.detach() + (0 if bias is None else bias)
    groups = choice.unflatten(-1, (n_group, experts // n_group))  # type: ignore[no-untyped-call]
    best = groups.topk(min(2, groups.shape[-1])).values.sum(-1).topk(topk_group).indices
    allowed = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(-1, best, True)
    indices = groups.masked_fill(~allowed[..., None], -math.inf).flatten(-2).topk(topk).indices
    weights = scores.gather(-1, indices)
    # [pairs, experts]: how many pairs of that expert there are up to and with this one
    visits = F.one_hot(indices.flatten(), experts).cumsum(0)
    rank = visits.gather(-1, indices.flatten()[:, None]).view_as(indices)
    kept = rank <= (indices.numel() if capacity_rows is None else capacity_rows)
    total = (weights * kept if renormalize_after_drop else weights).sum(-1, keepdim=True)
    weights = weights * kept / (total + 1e-20) * routed_scaling_factor
    return weights, torch.where(kept, indices, -1 - indices).int()


def _gate_peers(device: str) -> Mapping[str, Function]:
    def composition(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
        weights, indices = logits.softmax(-1).topk(topk)
        return weights / weights.sum(-1, keepdim=True), indices

    return {"torch": composition}


def _gate_work(sizes: Sizes, width: int) -> Work:
    """Logits read; weights and int32 indices written; five operations per score, a comparison per expert and slot."""
    tokens, experts, topk = sizes["tokens"], sizes["experts"], sizes["topk"]
    return Work(tokens * experts * (5 + topk), tokens * (experts * width + topk * (width + 4)))


def _gate_backward_work(sizes: Sizes, width: int) -> Work:
    """Logits, indices and dweights read, dlogits written."""
    tokens, experts, topk = sizes["tokens"], sizes["experts"], sizes["topk"]
    return Work(tokens * experts * 8, tokens * (2 * experts * width + topk * (width + 4)))


# --- moe_permute and moe_combine ---


def _permute_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    indices = _routing(sizes, draw)
    return {"x": draw(sizes["tokens"], sizes["hidden"]), "indices": indices, "experts": sizes["experts"]}


def _plan(indices: Tensor) -> tuple[Tensor, Tensor, int]:
    """row_of_slot [tokens, topk] and slot_of_row [pairs], -1 where there is none, and the number of kept pairs."""
    pairs = indices.flatten()
    kept = int((pairs >= 0).sum())
    order = torch.where(pairs < 0, torch.iinfo(torch.int32).max, pairs).argsort(stable=True)
    slot_of_row = order.clone()
    slot_of_row[kept:] = -1
    row_of_slot = torch.full_like(order, -1).scatter_(0, order[:kept], torch.arange(kept, device=order.device))
    return row_of_slot.view_as(indices), slot_of_row, kept


def _permute_formula(x: Tensor, indices: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row_of_slot, slot_of_row, kept = _plan(indices)
    rows = F.pad(x[slot_of_row[:kept] // indices.shape[1]], (0, 0, 0, indices.numel() - kept))
    return rows, _offsets(indices, experts), row_of_slot, slot_of_row


def _permute_peers(device: str) -> Mapping[str, Function]:
    def composition(x: Tensor, indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
        """The kept rows alone."""
        pairs = indices.flatten()
        order = pairs.argsort(stable=True)
        order = order[pairs[order] >= 0]
        return x[order // indices.shape[1]], pairs[order].bincount(minlength=experts).cumsum(0)

    return {"torch": composition}


def _permute_work(sizes: Sizes, width: int) -> Work:
    """Every token read, every row written, and three int32 per pair."""
    tokens, topk, hidden = sizes["tokens"], sizes["topk"], sizes["hidden"]
    return Work(0, tokens * (1 + topk) * hidden * width + 12 * tokens * topk)


def _combine_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    tokens, topk, hidden = sizes["tokens"], sizes["topk"], sizes["hidden"]
    return {
        "rows": draw(tokens * topk, hidden),
        "row_of_slot": _plan(_routing(sizes, draw))[0].int(),
        "weights": _pair_weights(sizes, draw),
        "shared": draw(tokens, hidden),
    }


def _combine_formula(rows: Tensor, row_of_slot: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
    picked = rows[row_of_slot.clamp_min(0).long()] * (weights * (row_of_slot >= 0))[..., None]
    return picked.sum(1) + shared


def _combine_peers(device: str) -> Mapping[str, Function]:
    def composition(rows: Tensor, row_of_slot: Tensor, weights: Tensor, shared: Tensor) -> Tensor:
        return torch.baddbmm(
            shared[:, None], (weights * (row_of_slot >= 0))[:, None].to(rows.dtype), rows[row_of_slot.clamp_min(0)]
        )[:, 0]

    return {"torch": composition}


def _combine_work(sizes: Sizes, width: int) -> Work:
    """Rows and shared read, y written; a product and a sum per element."""
    tokens, topk, hidden = sizes["tokens"], sizes["topk"], sizes["hidden"]
    return Work(2 * tokens * topk * hidden, tokens * (topk + 2) * hidden * width + 8 * tokens * topk)


def _combine_backward_work(sizes: Sizes, width: int) -> Work:
    """dy and rows read, drows and dshared written; a product per element of drows and a dot product per pair."""
    tokens, topk, hidden = sizes["tokens"], sizes["topk"], sizes["hidden"]
    return Work(3 * tokens * topk * hidden, tokens * (2 * topk + 2) * hidden * width + 12 * tokens * topk)


# --- grouped_gemm ---


def _gemm_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    rows, experts, n, k = sizes["tokens"] * sizes["topk"], sizes["experts"], sizes["n"], sizes["k"]
    return {
        "a": draw(rows, k),
        "b": draw(experts, n, k, scale=k**-0.5),
        "expert_offsets": _offsets(_routing(sizes, draw), experts),
    }


def _gemm_formula(a: Tensor, b: Tensor, expert_offsets: Tensor) -> Tensor:
    ends = expert_offsets.tolist()
    parts = [a[begin:end] @ matrix.T for begin, end, matrix in zip(ends, ends[1:], b, strict=False)]
    return F.pad(torch.cat(parts), (0, 0, 0, a.shape[0] - ends[-1]))


def _gemm_work(sizes: Sizes, width: int) -> Work:
    """a and b read, c written."""
    rows, n, k = sizes["tokens"] * sizes["topk"], sizes["n"], sizes["k"]
    return Work(2 * rows * n * k, (rows * (n + k) + _visited(sizes) * n * k) * width)


def _gemm_backward_work(sizes: Sizes, width: int) -> Work:
    """dc, a, b read, da and db (of every expert) written; a product for each."""
    forward = _gemm_work(sizes, width)
    elements = sizes["tokens"] * sizes["topk"] * sizes["k"] + sizes["experts"] * sizes["n"] * sizes["k"]
    return Work(2 * forward.flops, forward.bytes + elements * width)


def _quantised_gemm_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    inputs = _gemm_inputs(sizes, draw)
    return inputs | {"b": mxfp4_quantize(inputs["b"].float())}


def _quantised_gemm_formula(a: Tensor, b: MXFP4Tensor, expert_offsets: Tensor) -> Tensor:
    return _gemm_formula(a, b.dequantize(a.dtype), expert_offsets)


def _quantised_gemm_work(sizes: Sizes, width: int) -> Work:
    """a, codes and scales read, c written."""
    rows, n, k = sizes["tokens"] * sizes["topk"], sizes["n"], sizes["k"]
    return Work(2 * rows * n * k, rows * (n + k) * width + _visited(sizes) * n * k * 17 / 32)


# --- swiglu ---


def _swiglu_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    return {"z": draw(sizes["rows"], 2 * sizes["intermediate"], scale=2), "limit": 3.0}


def _swiglu_formula(z: Tensor, limit: float | None = None) -> Tensor:
    gate, up = z.chunk(2, dim=-1)
    bound = math.inf if limit is None else limit
    return F.silu(gate.clamp_max(bound)) * up.clamp(-bound, bound)


def _swiglu_work(sizes: Sizes, width: int) -> Work:
    """z read, y written; clamps, exponential, quotient, product."""
    elements = sizes["rows"] * sizes["intermediate"]
    return Work(8 * elements, 3 * elements * width)


def _swiglu_backward_work(sizes: Sizes, width: int) -> Work:
    """z and dy read, dz written."""
    elements = sizes["rows"] * sizes["intermediate"]
    return Work(14 * elements, 5 * elements * width)


# --- moe_ffn ---

_MATRICES = ("w13", "w2", "shared_w13", "shared_w2")


def _ffn_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    experts, hidden, inner, shared = (sizes[name] for name in ("experts", "hidden", "intermediate", "shared"))
    return {
        "x": draw(sizes["tokens"], hidden),
        "weights": _pair_weights(sizes, draw),
        "indices": _routing(sizes, draw),
        "w13": draw(experts, 2 * inner, hidden, scale=hidden**-0.5),
        "w2": draw(experts, hidden, inner, scale=inner**-0.5),
        "shared_w13": draw(2 * shared, hidden, scale=hidden**-0.5),
        "shared_w2": draw(hidden, shared, scale=shared**-0.5),
    }


def _ffn_formula(
    x: Tensor, weights: Tensor, indices: Tensor, w13: Tensor, w2: Tensor, shared_w13: Tensor, shared_w2: Tensor
) -> Tensor:
    y = _swiglu_formula(x @ shared_w13.T) @ shared_w2.T
    for expert, (first, second) in enumerate(zip(w13, w2, strict=True)):
        weight = (weights * (indices == expert)).sum(-1, keepdim=True)
        y = y + weight * (_swiglu_formula(x @ first.T) @ second.T)
    return y


def _ffn_peers(device: str) -> Mapping[str, Function]:
    def composition(
        x: Tensor, weights: Tensor, indices: Tensor, w13: Tensor, w2: Tensor, shared_w13: Tensor, shared_w2: Tensor
    ) -> Tensor:
        """One gather, two products per expert, one scatter."""
        pairs = indices.flatten()
        order = pairs.argsort(stable=True)
        order = order[pairs[order] >= 0]
        tokens = order // indices.shape[1]
        counts = pairs[order].bincount(minlength=w13.shape[0]).tolist()
        parts = zip(torch.split(x[tokens], counts), w13.unbind(), w2.unbind(), strict=True)
        out = torch.cat([F.linear(_torch_swiglu(F.linear(rows, a)), b) for rows, a, b in parts])
        y = F.linear(_torch_swiglu(F.linear(x, shared_w13)), shared_w2).to(weights.dtype)
        return y.index_add(0, tokens, out * weights.flatten()[order, None]).to(x.dtype)

    return {"torch": composition}


def _torch_swiglu(z: Tensor) -> Tensor:
    gate, up = z.chunk(2, dim=-1)
    return F.silu(gate) * up


def _ffn_products(sizes: Sizes) -> tuple[float, float, float]:
    """Operations of the products, elements of the matrices they need, elements of the tokens."""
    tokens, topk, hidden, inner, shared = (
        sizes[name] for name in ("tokens", "topk", "hidden", "intermediate", "shared")
    )
    matrices = 3 * hidden * (_visited(sizes) * inner + shared)
    return 6 * tokens * hidden * (topk * inner + shared), matrices, tokens * hidden


def _ffn_work(sizes: Sizes, width: int) -> Work:
    """x and the visited experts' matrices read, y written; three products per pair."""
    flops, matrices, tokens = _ffn_products(sizes)
    return Work(flops, (matrices + 2 * tokens) * width)


def _ffn_backward_work(sizes: Sizes, width: int) -> Work:
    """dy, x, z and the matrices read, dx and every expert's gradients written; two products for each forward one."""
    flops, matrices, tokens = _ffn_products(sizes)
    z = 2 * sizes["tokens"] * (sizes["topk"] * sizes["intermediate"] + sizes["shared"])
    gradients = 3 * sizes["hidden"] * (sizes["experts"] * sizes["intermediate"] + sizes["shared"])
    return Work(2 * flops, (matrices + gradients + 3 * tokens + z) * width)


def _quantised_ffn_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    """DeepSeek-V4's: routed experts in MXFP4, the shared one in FP8."""
    inputs = _ffn_inputs(sizes, draw)
    for name in _MATRICES:
        quantize: Callable[[Tensor], QTensor] = fp8_block_quantize if "shared" in name else mxfp4_quantize
        inputs[name] = quantize(inputs[name].float())
    return inputs


def _quantised(formula: Function) -> Function:
    """The formula, with the numbers that the matrices stand for."""

    def with_numbers(x: Tensor, **others: Any) -> Tensor:
        numbers = {k: v.dequantize(x.dtype) if isinstance(v, QTensor) else v for k, v in others.items()}
        result: Tensor = formula(x=x, **numbers)
        return result

    return with_numbers


def _quantised_ffn_work(sizes: Sizes, width: int) -> Work:
    """x and the visited experts' codes and scales read, y written."""
    flops, matrices, tokens = _ffn_products(sizes)
    shared = 3 * sizes["hidden"] * sizes["shared"]
    return Work(flops, (matrices - shared) * 17 / 32 + shared + 2 * tokens * width)


_WIDE = (torch.float64, torch.float32)
_FFN = {"tokens": 11, "topk": 2, "experts": 4, "hidden": 16, "intermediate": 12, "shared": 8}

CASES = (
    Case(
        operator="moe_gate",
        label="softmax",
        sizes={"tokens": 11, "experts": 8, "topk": 3},
        inputs=_gate_inputs,
        run=moe_gate,
        formula=_gate_formula,
        gradients=("logits",),
        dtypes=_WIDE,
        benchmark={
            "cpu": ({"tokens": 1024, "experts": 8, "topk": 2}, {"tokens": 4096, "experts": 256, "topk": 8}),
            "cuda": ({"tokens": 128, "experts": 256, "topk": 8}, {"tokens": 65536, "experts": 256, "topk": 8}),
        },
        work=_gate_work,
        backward_work=_gate_backward_work,
        peers=_gate_peers,
    ),
    Case(
        operator="moe_gate",
        label="sigmoid, groups, bias, capacity",
        sizes={"tokens": 11, "experts": 16, "topk": 3},
        inputs=_grouped_gate_inputs,
        run=moe_gate,
        formula=_gate_formula,
        gradients=("logits",),
        dtypes=_WIDE,
    ),
    Case(
        operator="moe_permute",
        sizes={"tokens": 11, "topk": 3, "experts": 5, "hidden": 16},
        inputs=_permute_inputs,
        run=moe_permute,
        formula=_permute_formula,
        gradients=("x",),
        backward="moe_combine",
        benchmark={"cpu": ({"tokens": 2048, "topk": 2, "experts": 8, "hidden": 512},)},
        work=_permute_work,
        peers=_permute_peers,
    ),
    Case(
        operator="grouped_gemm",
        sizes={"tokens": 11, "topk": 2, "experts": 5, "n": 12, "k": 16},
        inputs=_gemm_inputs,
        run=grouped_gemm,
        formula=_gemm_formula,
        gradients=("a", "b"),
        benchmark={
            "cpu": (
                {"tokens": 1024, "topk": 2, "experts": 8, "n": 256, "k": 128},
                {"tokens": 1024, "topk": 2, "experts": 16, "n": 1024, "k": 512},
            )
        },
        work=_gemm_work,
        backward_work=_gemm_backward_work,
        peers=lambda device: {"torch": _gemm_formula},
    ),
    Case(
        operator="grouped_gemm",
        label="MXFP4",
        sizes={"tokens": 11, "topk": 2, "experts": 5, "n": 12, "k": 64},
        inputs=_quantised_gemm_inputs,
        run=grouped_gemm,
        formula=_quantised_gemm_formula,
        gradients=("a",),
        benchmark={"cpu": ({"tokens": 1024, "topk": 2, "experts": 16, "n": 1024, "k": 512},)},
        work=_quantised_gemm_work,
        backward_work=_quantised_gemm_work,
        peers=lambda device: {"torch": _quantised_gemm_formula},
    ),
    Case(
        operator="swiglu",
        sizes={"rows": 9, "intermediate": 24},
        inputs=_swiglu_inputs,
        run=swiglu,
        formula=_swiglu_formula,
        gradients=("z",),
        benchmark={
            "cpu": ({"rows": 2048, "intermediate": 128}, {"rows": 4096, "intermediate": 1024}),
            "cuda": ({"rows": 128, "intermediate": 2048}, {"rows": 16384, "intermediate": 2048}),
        },
        work=_swiglu_work,
        backward_work=_swiglu_backward_work,
        peers=lambda device: {"torch": _swiglu_formula},
    ),
    Case(
        operator="moe_combine",
        sizes={"tokens": 11, "topk": 3, "experts": 5, "hidden": 16},
        inputs=_combine_inputs,
        run=moe_combine,
        formula=_combine_formula,
        gradients=("rows", "weights", "shared"),
        benchmark={"cpu": ({"tokens": 2048, "topk": 2, "experts": 8, "hidden": 512},)},
        work=_combine_work,
        backward_work=_combine_backward_work,
        peers=_combine_peers,
    ),
    Case(
        operator="moe_ffn",
        sizes=_FFN,
        inputs=_ffn_inputs,
        run=moe_ffn,
        formula=_ffn_formula,
        gradients=("x", "weights", *_MATRICES),
        reads_rounded=True,
        benchmark={
            "cpu": (
                {"tokens": 1024, "topk": 2, "experts": 8, "hidden": 128, "intermediate": 128, "shared": 128},
                {"tokens": 1024, "topk": 2, "experts": 16, "hidden": 512, "intermediate": 256, "shared": 256},
            )
        },
        work=_ffn_work,
        backward_work=_ffn_backward_work,
        peers=_ffn_peers,
    ),
    Case(
        operator="moe_ffn",
        label="one token",
        sizes=_FFN | {"tokens": 1},
        inputs=_ffn_inputs,
        run=moe_ffn,
        formula=_ffn_formula,
        benchmark={
            "cpu": ({"tokens": 1, "topk": 2, "experts": 16, "hidden": 512, "intermediate": 256, "shared": 256},)
        },
        work=_ffn_work,
        peers=_ffn_peers,
    ),
    Case(
        operator="moe_ffn",
        label="MXFP4, shared expert in FP8",
        sizes=_FFN | {"hidden": 64, "intermediate": 32},
        inputs=_quantised_ffn_inputs,
        run=moe_ffn,
        formula=_quantised(_ffn_formula),
        gradients=("x", "weights"),
        reads_rounded=True,
        benchmark={
            "cpu": ({"tokens": 1024, "topk": 2, "experts": 16, "hidden": 512, "intermediate": 256, "shared": 256},)
        },
        work=_quantised_ffn_work,
        peers=lambda device: {name: _quantised(function) for name, function in _ffn_peers(device).items()},
    ),
)
