# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The formats of quantised caches composed from torch's own operators; a format is named by its bytes per row."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "QUANTIZED",
    "V4_FP8",
    "V32_FP8",
    "V32_NVFP4",
    "V41_FP4",
    "V41_FP8",
    "e4m3",
    "gather",
    "power_of_two",
    "quantize",
    "store",
    "width_of",
]

V32_FP8, V32_NVFP4, V4_FP8, V41_FP8, V41_FP4 = 656, 352, 584, 528, 288
QUANTIZED = (V32_FP8, V32_NVFP4, V4_FP8, V41_FP8, V41_FP4)


def width_of(size: int) -> int:
    """Values of a row of so many bytes, or of as many values."""
    return 512 if size in (V4_FP8, V41_FP8, V41_FP4) else 576 if size in QUANTIZED else size


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def e4m3(x: Tensor) -> Tensor:
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


def power_of_two(amax: Tensor) -> Tensor:
    """The smallest power of two that is at least amax / 448."""
    mantissa, exponent = torch.frexp(amax.clamp_min(1e-4) * (1 / torch.tensor(448.0)))
    return torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int())


def _e8m0_scale(amax: Tensor) -> Tensor:
    return power_of_two(amax).to(torch.float8_e8m0fnu)


def _float32_scale(amax: Tensor) -> Tensor:
    return _quotient(amax, 448).clamp_min(torch.finfo(torch.float32).tiny)


def _v41_scale(amax: Tensor) -> Tensor:
    return e4m3(_quotient(amax, 6).clamp_min(2.0**-9))


def _nvfp4_scale(amax: Tensor) -> Tensor:
    return _v41_scale(torch.where(amax == 0, 6.0, amax))


def quantize(
    x: Tensor, group: int, element: Callable[[Tensor], Tensor], scale: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Bytes of the elements and of the scales."""
    groups: Tensor = x.unflatten(-1, (-1, group))  # type: ignore[no-untyped-call]
    scales = scale(groups.abs().amax(-1))
    return _bytes(element((groups / scales.float()[..., None]).flatten(-2))), _bytes(scales)


def _records(rows: Tensor, size: int, scale_format: str) -> Tensor:
    """``[rows, size]`` bytes of quantised rows, V4's with the scales behind the data."""
    x = rows.float()
    if size == V32_FP8:
        codes, scales = quantize(x[:, :512], 128, e4m3, _float32_scale if scale_format == "fp32" else power_of_two)
        return torch.cat((codes, scales, _bytes(x[:, 512:].bfloat16())), -1)
    if size == V32_NVFP4:
        codes, scales = quantize(x[:, :512], 16, _e2m1, _nvfp4_scale)
        return torch.cat((codes, _bytes(e4m3(x[:, 512:])), scales), -1)
    if size == V4_FP8:
        codes, scales = quantize(x[:, :448], 64, e4m3, _e8m0_scale)
        return F.pad(torch.cat((codes, _bytes(x[:, 448:].bfloat16()), scales), -1), (0, 1))
    fp8 = size == V41_FP8
    return torch.cat(quantize(x, 32, e4m3, _e8m0_scale) if fp8 else quantize(x, 16, _e2m1, _v41_scale), -1)


def _float(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.contiguous().view(dtype).float()


def _float_e2m1(pairs: Tensor) -> Tensor:
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=pairs.device)
    codes = torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)
    values: Tensor = torch.cat((numbers, -numbers))[codes.int()]
    return values


def _scaled(elements: Tensor, scales: Tensor) -> Tensor:
    groups: Tensor = elements.unflatten(-1, (scales.shape[-1], -1))  # type: ignore[no-untyped-call]
    return (groups * scales[..., None]).flatten(-2)


def _values(records: Tensor) -> Tensor:
    """What _records has made, in float32."""
    r, size, fp8, e8m0 = records, records.shape[-1], torch.float8_e4m3fn, torch.float8_e8m0fnu
    if size == V32_FP8:
        latent = _scaled(_float(r[:, :512], fp8), _float(r[:, 512:528], torch.float32))
        return torch.cat((latent, _float(r[:, 528:], torch.bfloat16)), -1)
    if size == V32_NVFP4:
        return torch.cat((_scaled(_float_e2m1(r[:, :256]), _float(r[:, 320:], fp8)), _float(r[:, 256:320], fp8)), -1)
    if size == V4_FP8:
        scaled = _scaled(_float(r[:, :448], fp8), _float(r[:, 576:583], e8m0))
        return torch.cat((scaled, _float(r[:, 448:576], torch.bfloat16)), -1)
    if size == V41_FP8:
        return _scaled(_float(r[:, :512], fp8), _float(r[:, 512:], e8m0))
    return _scaled(_float_e2m1(r[:, :256]), _float(r[:, 256:], fp8))


def _parts(cache: Tensor) -> list[Tensor]:
    """Views [pages, page_size, bytes or width] of what a page has one after the other: V4's data and scales."""
    pages, page_size, _, size = cache.shape
    if cache.dtype != torch.uint8 or size != V4_FP8:
        return [cache.squeeze(2)]
    data, scales = cache.view(pages, -1).tensor_split((page_size * 576,), -1)
    return [data.view(pages, page_size, 576), scales.view(pages, page_size, 8)]


def store(cache: Tensor, rows: Tensor, slots: Tensor, scale_format: str = "ue8m0") -> Tensor:
    """Writes the rows whose slot is not -1, in place, and returns the cache."""
    kept = slots >= 0
    page, entry = slots[kept] // cache.shape[1], slots[kept] % cache.shape[1]
    rows = _records(rows, cache.shape[3], scale_format) if cache.dtype == torch.uint8 else rows.to(cache.dtype)
    begin = 0
    for part in _parts(cache):
        part[page, entry] = rows[kept, begin : begin + part.shape[-1]]
        begin += part.shape[-1]
    return cache


def gather(cache: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of the indices, in ``dtype``; zeros for -1."""
    page, entry = indices // cache.shape[1], indices % cache.shape[1]
    rows = torch.cat([part[page, entry] for part in _parts(cache)], -1)
    values = _values(rows) if cache.dtype == torch.uint8 else rows
    return values.to(dtype).masked_fill_((indices < 0)[:, None], 0)
