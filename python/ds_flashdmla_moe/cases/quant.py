# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Cases of the quantisers: codes and scales are bytes, and exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.quant import MxRule, ScaleFormat, fp8_block_quantize, mxfp4_quantize, mxfp4_to_fp8, nvfp4_quantize
from ..qtensor import MXFP4Tensor
from .case import Case, Draw, Function, Sizes, Work


def _inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    """Rows of different magnitudes, so that scales differ."""
    x = draw(sizes["rows"], sizes["columns"])
    return {"x": x * torch.exp2(torch.arange(sizes["rows"], device=draw.device) % 9 - 4).to(draw.dtype)[:, None]}


def _work(bytes_per_element: float) -> Callable[[Sizes, int], Work]:
    """x read, codes and scales written; magnitude, maximum, quotient and rounding."""

    def work(sizes: Sizes, width: int) -> Work:
        elements = sizes["rows"] * sizes["columns"]
        return Work(4 * elements, elements * (width + bytes_per_element))

    return work


def _exponent_above(x: Tensor) -> Tensor:
    """Of the smallest power of two >= x."""
    mantissa, exponent = torch.frexp(x)
    return exponent - (mantissa == 0.5).int()


def _power(exponent: Tensor) -> Tensor:
    return torch.exp2(exponent.double()).float()


def _e2m1_pairs(x: Tensor) -> Tensor:
    # A tie goes to the even code: of these bounds the second, fourth and sixth themselves round up.
    bounds = x.new_tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5])
    bounds[1::2] = torch.nextafter(bounds[1::2], torch.zeros_like(bounds[1::2]))
    codes = torch.bucketize(x.abs(), bounds, out_int32=True).to(torch.uint8) | x.signbit().to(torch.uint8) << 3
    return codes[..., 0::2] | codes[..., 1::2] << 4


def _fp8(block: tuple[int, int], scale_format: ScaleFormat) -> Function:
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        q = fp8_block_quantize(x, block, scale_format)
        return q.data.view(torch.uint8), q.scales if scale_format == "fp32" else q.scales.view(torch.uint8)

    return run


def _fp8_formula(block: tuple[int, int], scale_format: ScaleFormat) -> Function:
    def formula(x: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = x.shape
        down, across = math.ceil(rows / block[0]), math.ceil(columns / block[1])
        padded = F.pad(x.float(), (0, across * block[1] - columns, 0, down * block[0] - rows))
        blocks = padded.view(down, block[0], across, block[1])
        amax = blocks.abs().amax((1, 3), keepdim=True).clamp_min(1e-4)
        exponent = _exponent_above(amax * (1 / 448))
        scales = _power(exponent) if scale_format == "ue8m0" else amax / 448
        codes = (blocks / scales).to(torch.float8_e4m3fn).view(torch.uint8).view(padded.shape)[:rows, :columns]
        return codes, (exponent + 127 if scale_format == "ue8m0" else scales).view(down, across)

    return formula


def _nvfp4(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q = nvfp4_quantize(x)
    return q.packed, q.scales.view(torch.uint8), q.global_scale


def _nvfp4_formula(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.float()
    groups = x.view(*x.shape[:-1], -1, 16)
    factor = x.abs().max() / 2688
    scales = groups.abs().amax(-1, keepdim=True) / (6 * factor)
    scales = torch.where(scales == 0, 1, scales).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    scaled = groups / (scales.float() * factor) + 0.0  # -0 becomes 0
    return _e2m1_pairs(scaled.view(x.shape)), scales.view(torch.uint8).squeeze(-1), factor


def _mxfp4(rule: MxRule) -> Function:
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        q = mxfp4_quantize(x, rule)
        return q.packed, q.scales.view(torch.uint8)

    return run


def _mxfp4_formula(rule: MxRule) -> Function:
    def formula(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float()
        groups = x.view(*x.shape[:-1], -1, 32)
        amax = groups.abs().amax(-1, keepdim=True)
        exponent = _exponent_above(amax * (1 / 6)) if rule == "ceil" else torch.frexp(amax).exponent - 3
        return _e2m1_pairs((groups / _power(exponent)).view(x.shape)), exponent.squeeze(-1) + 127

    return formula


def _cast_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    """Every code, and scales that lie within 2^14."""
    rows, columns = sizes["rows"], sizes["columns"]
    numbers = draw(rows, columns // 2).abs().mul(1000).int() % 256
    return {"packed": numbers.to(torch.uint8), "scales": (numbers[:, ::16] % 15 + 113).to(torch.uint8)}


def _cast(packed: Tensor, scales: Tensor) -> Tensor:
    return mxfp4_to_fp8(MXFP4Tensor(packed, scales)).dequantize(torch.float64)


def _cast_formula(packed: Tensor, scales: Tensor) -> Tensor:
    return MXFP4Tensor(packed, scales).dequantize(torch.float64)


def _torch(formula: Function) -> Callable[[str], Mapping[str, Function]]:
    return lambda device: {"torch": formula}


_CPU = {"cpu": ({"rows": 16, "columns": 7168}, {"rows": 512, "columns": 2048})}

CASES = (
    Case(
        operator="fp8_quantize",
        label="groups of 128, powers of two",
        sizes={"rows": 5, "columns": 300},
        inputs=_inputs,
        run=_fp8((1, 128), "ue8m0"),
        formula=_fp8_formula((1, 128), "ue8m0"),
        benchmark=_CPU,
        work=_work(1 + 1 / 128),
        peers=_torch(_fp8_formula((1, 128), "ue8m0")),
    ),
    Case(
        operator="fp8_quantize",
        label="blocks, float32 scales",
        sizes={"rows": 70, "columns": 40},
        inputs=_inputs,
        run=_fp8((32, 32), "fp32"),
        formula=_fp8_formula((32, 32), "fp32"),
        benchmark={"cpu": ({"rows": 512, "columns": 2048},)},
        work=_work(1 + 4 / 1024),
        peers=_torch(_fp8_formula((32, 32), "fp32")),
    ),
    Case(
        operator="nvfp4_quantize",
        sizes={"rows": 11, "columns": 64},
        inputs=_inputs,
        run=_nvfp4,
        formula=_nvfp4_formula,
        benchmark=_CPU,
        work=_work(0.5 + 1 / 16),
        peers=_torch(_nvfp4_formula),
    ),
    Case(
        operator="mxfp4_quantize",
        label="ceil",
        sizes={"rows": 11, "columns": 96},
        inputs=_inputs,
        run=_mxfp4("ceil"),
        formula=_mxfp4_formula("ceil"),
        benchmark=_CPU,
        work=_work(0.5 + 1 / 32),
        peers=_torch(_mxfp4_formula("ceil")),
    ),
    Case(
        operator="mxfp4_quantize",
        label="ocp",
        sizes={"rows": 11, "columns": 96},
        inputs=_inputs,
        run=_mxfp4("ocp"),
        formula=_mxfp4_formula("ocp"),
    ),
    Case(
        operator="mxfp4_to_fp8",
        sizes={"rows": 130, "columns": 160},
        inputs=_cast_inputs,
        run=_cast,
        formula=_cast_formula,
        dtypes=(torch.float32,),
    ),
)
