# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Quantised weights and activations from the definitions of their formats, in float64; and random ones of each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ds_flashdmla_moe.quant import FP8Tensor, MXFP4Tensor, NVFP4Tensor, QTensor


def _e4m3(codes: Tensor) -> Tensor:
    """1 sign, 4 exponent (bias 7) and 3 mantissa bits; the code of all ones is NaN."""
    bits = codes.view(torch.uint8).long()
    exponent, mantissa = bits >> 3 & 15, (bits & 7).double()
    value = torch.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10).double())
    value = torch.where(bits & 127 == 127, torch.nan, value)
    return torch.where(bits >= 128, -value, value)


def _e8m0(codes: Tensor) -> Tensor:
    bits = codes.view(torch.uint8).double()
    return torch.where(bits == 255, torch.nan, 2.0 ** (bits - 127))


def _e2m1(packed: Tensor) -> Tensor:
    """1 sign, 2 exponent (bias 1) and 1 mantissa bits; the low nibble comes first."""
    nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()
    exponent, mantissa = nibbles >> 1 & 3, (nibbles & 1).double()
    value = torch.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1).double())
    return torch.where(nibbles >= 8, -value, value)


def _spread(scales: Tensor, rows: int, columns: int, n: int, k: int) -> Tensor:
    """The scale of every element."""
    row, column = torch.arange(n) // rows, torch.arange(k) // columns
    return scales[..., row, :][..., column]


def numbers(q: Tensor | QTensor) -> Tensor:
    """What the codes stand for, exactly."""
    if isinstance(q, Tensor):
        return q.detach().double()
    n, k = q.shape[-2:]
    if isinstance(q, FP8Tensor):
        scales = q.scales.double() if q.scales.dtype == torch.float32 else _e8m0(q.scales)
        return _e4m3(q.data) * _spread(scales, *q.block, n, k)
    if isinstance(q, MXFP4Tensor):
        return _e2m1(q.packed) * _spread(_e8m0(q.scales), 1, 32, n, k)
    factor = q.global_scale.double()
    factor = factor[..., None, None] if 0 < factor.dim() == q.packed.dim() - 2 else factor[..., None]
    return _e2m1(q.packed) * _spread(_e4m3(q.scales), 1, 16, n, k) * factor


def fp8(x: Tensor) -> Tensor:
    """act_quant: groups of 128, the scale a power of two from the largest magnitude in float32, at least 1e-4."""
    parts = []
    for group in x.double().split(128, -1):
        largest = group.abs().amax(-1, keepdim=True).float().clamp_min(1e-4)
        fraction, exponent = torch.frexp(largest * torch.tensor(1 / 448, dtype=torch.float32))
        scale = 2.0 ** (exponent - (fraction == 0.5).int()).double()
        value = group / scale
        step = 2.0 ** (torch.frexp(value)[1] - 1).clamp_min(-6).sub(3).double()
        parts.append((value / step).round() * step * scale)  # round() takes ties to even
    return torch.cat(parts, -1) if parts else x.double()


# --- random weights ---


def _fp4_codes(*shape: int) -> Tensor:
    return torch.randint(256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8)


def _powers(*shape: int) -> Tensor:
    return torch.randint(120, 126, shape, dtype=torch.uint8).view(torch.float8_e8m0fnu)


def _fp8_codes(*shape: int) -> Tensor:
    codes = torch.randint(256, shape, dtype=torch.uint8)
    return torch.where(codes & 127 == 127, 0, codes).to(torch.uint8).view(torch.float8_e4m3fn)


def _fp8(block: tuple[int, int], float_scales: bool = False) -> Callable[..., FP8Tensor]:
    def make(*shape: int) -> FP8Tensor:
        blocks = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
        scales = torch.rand(blocks) / 300 if float_scales else torch.randint(117, 121, blocks, dtype=torch.uint8)
        return FP8Tensor(_fp8_codes(*shape), scales, block)

    return make


def _mxfp4(*shape: int) -> MXFP4Tensor:
    return MXFP4Tensor(_fp4_codes(*shape), _powers(*shape[:-1], shape[-1] // 32))


def _nvfp4(*shape: int) -> NVFP4Tensor:
    """One global scale for all of a matrix, one per expert for several."""
    scales = (torch.rand(*shape[:-1], shape[-1] // 16) * 400).to(torch.float8_e4m3fn)
    return NVFP4Tensor(_fp4_codes(*shape), scales, torch.rand(shape[:-2]) / 1000)


def _nvfp4_by_row(*shape: int) -> NVFP4Tensor:
    q = _nvfp4(*shape)
    return NVFP4Tensor(q.packed, q.scales, torch.rand(shape[:-1]) / 1000)


# Makers of random weights [..., n, k] by name; k is a multiple of 32 for the FP4 formats.
FORMATS: dict[str, Callable[..., QTensor]] = {
    "fp8 128x128 e8m0": _fp8((128, 128)),
    "fp8 128x128 fp32": _fp8((128, 128), float_scales=True),
    "fp8 32x32 e8m0": _fp8((32, 32)),
    "fp8 5x7 fp32": _fp8((5, 7), float_scales=True),
    "mxfp4": _mxfp4,
    "nvfp4": _nvfp4,
    "nvfp4 by row": _nvfp4_by_row,
}
