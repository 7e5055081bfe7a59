# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Cases of the paged caches. What is compared of a quantised cache are its bytes, which have to be the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..ops import indexer_k_insert, kv_gather, mla_kv_insert, rope_frequencies, v4_kv_insert
from .case import Case, Draw, Function, Sizes, Work

# --- the formats, by their bytes per row ---

_V32_FP8, _V32_NVFP4, _V4_FP8, _V41_FP8, _V41_FP4 = 656, 352, 584, 528, 288
_QUANTIZED = (_V32_FP8, _V32_NVFP4, _V4_FP8, _V41_FP8, _V41_FP4)


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn)


def _e2m1(x: Tensor) -> Tensor:
    """Codes of neighbours in pairs. A tie goes to the even code: down at the first points, up at the others."""
    down = torch.tensor([0.25, 1.25, 2.5, 5.0], device=x.device)
    up = torch.tensor([0.75, 1.75, 3.5], device=x.device)
    size = x.abs()
    codes = torch.bucketize(size, down) + torch.bucketize(size, up, right=True) + 8 * x.signbit()
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)


def _quotient(x: Tensor, divisor: float) -> Tensor:
    """Rounded once. A Python number would be multiplied by as its reciprocal on a GPU."""
    return x / x.new_full((), divisor)


def _power_of_two(amax: Tensor) -> Tensor:
    """The smallest power of two that is at least amax / 448."""
    mantissa, exponent = torch.frexp(amax.clamp_min(1e-4) * (1 / torch.tensor(448.0)))
    return torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int())


def _e8m0_scale(amax: Tensor) -> Tensor:
    return _power_of_two(amax).to(torch.float8_e8m0fnu)


def _float32_scale(amax: Tensor) -> Tensor:
    return _quotient(amax, 448).clamp_min(torch.finfo(torch.float32).tiny)


def _e4m3_scale(amax: Tensor) -> Tensor:
    sixth = _quotient(amax, 6)
    return _e4m3(torch.where(sixth == 0, 1.0, sixth).clamp_min(2.0**-9))


def _quantize(x: Tensor, group: int, element: Function, scale: Function) -> tuple[Tensor, Tensor]:
    """Bytes of the elements and of the scales."""
    groups = x.unflatten(-1, (-1, group))  # type: ignore[no-untyped-call]
    scales = scale(groups.abs().amax(-1))
    return _bytes(element((groups / scales.float()[..., None]).flatten(-2))), _bytes(scales)


def _records(rows: Tensor, size: int, scale_format: str) -> Tensor:
    """``[rows, size]`` bytes of quantised rows, V4's with the scales behind the data."""
    x = rows.float()
    if size == _V32_FP8:
        codes, scales = _quantize(x[:, :512], 128, _e4m3, _float32_scale if scale_format == "fp32" else _power_of_two)
        return torch.cat((codes, scales, _bytes(x[:, 512:].bfloat16())), -1)
    if size == _V32_NVFP4:
        codes, scales = _quantize(x[:, :512], 16, _e2m1, _e4m3_scale)
        return torch.cat((codes, _bytes(_e4m3(x[:, 512:])), scales), -1)
    if size == _V4_FP8:
        codes, scales = _quantize(x[:, :448], 64, _e4m3, _e8m0_scale)
        return F.pad(torch.cat((codes, _bytes(x[:, 448:].bfloat16()), scales), -1), (0, 1))
    fp8 = size == _V41_FP8
    return torch.cat(_quantize(x, 32, _e4m3, _e8m0_scale) if fp8 else _quantize(x, 16, _e2m1, _e4m3_scale), -1)


def _store(cache: Tensor, rows: Tensor, slots: Tensor, scale_format: str = "ue8m0") -> Tensor:
    """Writes the rows whose slot is not -1, in place, and returns the cache."""
    pages, page_size, _, size = cache.shape
    kept = slots >= 0
    page, entry = slots[kept] // page_size, slots[kept] % page_size
    if cache.dtype == torch.uint8:
        rows = _records(rows, size, scale_format)
    if cache.dtype == torch.uint8 and size == _V4_FP8:
        data, scales = cache.view(pages, -1).tensor_split((page_size * 576,), -1)
        data.view(pages, page_size, 576)[page, entry] = rows[kept, :576]
        scales.view(pages, page_size, 8)[page, entry] = rows[kept, 576:]
    else:
        cache[page, entry, 0] = rows[kept].to(cache.dtype)
    return cache


# --- inputs ---


def _cache(sizes: Sizes, draw: Draw, size: int) -> Tensor:
    """Zeros; quantised where the size is the bytes of a format."""
    dtype = torch.uint8 if size in _QUANTIZED else draw.dtype
    return torch.zeros(sizes["pages"], sizes["page_size"], 1, size, dtype=dtype, device=draw.device)


def _slots(sizes: Sizes, draw: Draw) -> Tensor:
    """Different random rows; every seventh token has none."""
    slots = draw(sizes["pages"] * sizes["page_size"]).argsort()[: sizes["tokens"]]
    slots[::7] = -1
    return slots


def _spread(x: Tensor) -> Tensor:
    """Magnitudes from 2^-8 to 2^7, so that groups get different scales."""
    return x * torch.exp2(torch.arange(x.shape[-1], device=x.device) // 32 % 16 - 8.0).to(x.dtype)


Inputs = Callable[[Sizes, Draw], dict[str, Any]]


def _mla_inputs(size: int, scale_format: str = "ue8m0") -> Inputs:
    return lambda sizes, draw: {
        "latent": _spread(draw(sizes["tokens"], 512)),
        "k_pe": draw(sizes["tokens"], 64),
        "cache": _cache(sizes, draw, size),
        "slots": _slots(sizes, draw),
        "scale_format": scale_format,
    }


def _v4_inputs(size: int) -> Inputs:
    return lambda sizes, draw: {
        "kv": _spread(draw(sizes["tokens"], 512)),
        "cache": _cache(sizes, draw, size),
        "slots": _slots(sizes, draw),
    }


def _v4_whole_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    return _v4_inputs(512)(sizes, draw) | {
        "weight": draw(512),
        "positions": torch.arange(sizes["tokens"], device=draw.device) * 37,
        "inv_freq": rope_frequencies(64).to(draw.device),
    }


def _indexer_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    tokens, shape = sizes["tokens"], (sizes["pages"], sizes["page_size"], 1, sizes["d"] + 4)
    return {
        "k": draw(tokens, sizes["d"]) * torch.exp2(4 * draw(tokens, 1)),
        "cache": torch.zeros(shape, dtype=torch.uint8, device=draw.device),
        "slots": _slots(sizes, draw),
    }


def _gather_inputs(size: int) -> Inputs:
    """Rows of E2M1 numbers times powers of two, with the largest in every group: all formats hold them exactly."""

    def inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
        cache = _cache(sizes, draw, size)
        count, width = cache.shape[0] * cache.shape[1], 512 if size in (_V4_FP8, _V41_FP8, _V41_FP4) else 576
        rows = (2 * draw(count, width)).round().clamp(-4, 4)
        rows[:, ::16] = 6
        rows[:, :512] *= torch.exp2(torch.arange(512, device=draw.device) // 16 % 8 - 4.0)
        every = torch.arange(count, device=draw.device)
        if width == 576:
            mla_kv_insert(rows[:, :512], rows[:, 512:], cache, every)
        else:
            v4_kv_insert(rows, cache, every)
        return {"cache": cache, "indices": _slots(sizes, draw).int(), "dtype": draw.dtype, "rows": rows}

    return inputs


# --- what the operators compute ---


def _changed(operator: Function) -> Function:
    """The operator as a function whose result is the cache."""

    def run(**inputs: Any) -> Tensor:
        operator(**inputs)
        return inputs["cache"]  # type: ignore[no-any-return]

    return run


def _anew(formula: Function) -> Function:
    """The formula on a cache of its own, as the operator's was before its first call."""
    return lambda **inputs: formula(**inputs | {"cache": torch.zeros_like(inputs["cache"])})


def _mla_insert(latent: Tensor, k_pe: Tensor, cache: Tensor, slots: Tensor, scale_format: str) -> Tensor:
    return _store(cache, torch.cat((latent, k_pe), -1), slots, scale_format)


def _v4_insert(kv: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
    return _store(cache, kv, slots)


def _v4_whole(kv: Tensor, cache: Tensor, slots: Tensor, weight: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    normalized = kv * (kv.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
    return _store(cache, reference.rope(normalized[:, None], positions, inv_freq.float())[:, 0], slots)


def _indexer_insert(k: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
    (codes, scales), (pages, page_size, _, _) = _quantize(k.float(), k.shape[-1], _e4m3, _power_of_two), cache.shape
    kept = slots >= 0
    page, entry = slots[kept] // page_size, slots[kept] % page_size
    of_codes, of_scales = cache.view(pages, -1).tensor_split((page_size * k.shape[-1],), -1)
    of_codes.view(pages, page_size, -1)[page, entry] = codes[kept]
    of_scales.view(pages, page_size, 4)[page, entry] = scales[kept]
    return cache


def _gather(cache: Tensor, indices: Tensor, dtype: torch.dtype, rows: Tensor) -> Tensor:
    return kv_gather(cache, indices, dtype)


def _gathered(cache: Tensor, indices: Tensor, dtype: torch.dtype, rows: Tensor) -> Tensor:
    return rows[indices.long()] * (indices >= 0)[:, None]


def _gather_peer(cache: Tensor, indices: Tensor, dtype: torch.dtype, rows: Tensor) -> Tensor:
    return cache.flatten(0, 2)[indices]


# --- the cases ---

_SMALL = {"tokens": 23, "pages": 5, "page_size": 6}
_CUDA = ({"tokens": 128, "pages": 64, "page_size": 64}, {"tokens": 131072, "pages": 2304, "page_size": 64})
_CPU = ({"tokens": 64, "pages": 16, "page_size": 64}, {"tokens": 4096, "pages": 80, "page_size": 64})
_WIDE = (torch.float64, torch.float32)


def _rows_work(values: int, row_bytes: int) -> Callable[[Sizes, int], Work]:
    """Rows of values on one side and of bytes on the other, plain ones where row_bytes is 0."""
    return lambda sizes, width: Work(0, sizes["tokens"] * (values * width + (row_bytes or values * width)))


def _measured(values: int, row_bytes: int, peer: Function | None) -> dict[str, Any]:
    peers: Mapping[str, Function] = {"torch": peer} if peer else {}
    return {
        "benchmark": {"cpu": _CPU, "cuda": _CUDA},
        "work": _rows_work(values, row_bytes),
        "peers": lambda device: peers,
    }


def _mla_case(label: str, size: int, scale_format: str = "ue8m0") -> Case:
    return Case(
        operator="mla_kv_insert",
        label=label,
        sizes=_SMALL,
        inputs=_mla_inputs(size, scale_format),
        run=_changed(mla_kv_insert),
        formula=_anew(_mla_insert),
        **_measured(576, size if size in _QUANTIZED else 0, _mla_insert),
    )


def _v4_case(label: str, size: int) -> Case:
    return Case(
        operator="v4_kv_insert",
        label=label,
        sizes=_SMALL,
        inputs=_v4_inputs(size),
        run=_changed(v4_kv_insert),
        formula=_anew(_v4_insert),
        **_measured(512, size, _v4_insert),
    )


def _gather_case(label: str, size: int, peer: Function | None = None) -> Case:
    values = 512 if size in (_V4_FP8, _V41_FP8, _V41_FP4) else 576
    return Case(
        operator="kv_gather",
        label=label,
        sizes=_SMALL,
        inputs=_gather_inputs(size),
        run=_gather,
        formula=_gathered,
        **_measured(values, size if size in _QUANTIZED else 0, peer),
    )


CASES = (
    _mla_case("plain", 576),
    _mla_case("V3.2 FP8", _V32_FP8),
    _mla_case("V3.2 FP8, float32 scales", _V32_FP8, "fp32"),
    _mla_case("V3.2 NVFP4", _V32_NVFP4),
    Case(
        operator="v4_kv_insert",
        label="normalised, rotated, plain",
        sizes=_SMALL,
        inputs=_v4_whole_inputs,
        run=_changed(v4_kv_insert),
        formula=_anew(_v4_whole),
        dtypes=_WIDE,  # the formula has not the roundings between the steps that narrower rows have
        **_measured(512, 0, _v4_whole),
    ),
    _v4_case("V4 FP8", _V4_FP8),
    _v4_case("V4.1 FP8", _V41_FP8),
    _v4_case("V4.1 FP4", _V41_FP4),
    Case(
        operator="indexer_k_insert",
        sizes=_SMALL | {"d": 32},
        inputs=_indexer_inputs,
        run=_changed(indexer_k_insert),
        formula=_anew(_indexer_insert),
        benchmark={
            "cpu": tuple(sizes | {"d": 128} for sizes in _CPU),
            "cuda": tuple(sizes | {"d": 128} for sizes in (*_CUDA, {"tokens": 524288, "pages": 8200, "page_size": 64})),
        },
        work=lambda sizes, width: Work(0, sizes["tokens"] * (sizes["d"] * (width + 1) + 4)),
        peers=lambda device: {"torch": _indexer_insert},
    ),
    _gather_case("plain", 576, _gather_peer),
    _gather_case("V3.2 FP8", _V32_FP8),
    _gather_case("V3.2 NVFP4", _V32_NVFP4),
    _gather_case("V4 FP8", _V4_FP8),
    _gather_case("V4.1 FP8", _V41_FP8),
    _gather_case("V4.1 FP4", _V41_FP4),
)
