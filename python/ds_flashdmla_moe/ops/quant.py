# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Quantisers, and exact casts between quantised formats.

None is differentiable. A NaN or an infinity in a block makes the block's scale NaN; float64 input is rounded to float32
first.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..qtensor import FP8Tensor, MXFP4Tensor, NVFP4Tensor
from ._register import adjacent, fake

ScaleFormat = Literal["ue8m0", "fp32"]
MxRule = Literal["ceil", "ocp"]

# The operators take and give E8M0 scales as uint8, which the tensor classes view.


def _matrices(operation: str, x: Tensor, columns: int = 1) -> Tensor:
    """``x`` as ``[matrices, rows, columns]`` without its graph."""
    if x.dim() == 0 or x.shape[-1] % columns:
        raise ValueError(f"{operation}: x must be [..., K] with K a multiple of {columns}, got {list(x.shape)}")
    x = x.detach()
    x = adjacent(x)
    return x.reshape(math.prod(x.shape[:-2]), x.shape[-2] if x.dim() > 1 else 1, x.shape[-1])


def fp8_quantize(x: Tensor, group_size: int = 128, scale_format: ScaleFormat = "ue8m0") -> FP8Tensor:
    """FP8 E4M3 with a scale for each ``group_size`` neighbours of a row; the last group may be smaller.

    With ``a = max(amax, 1e-4)``, in float32: ``"ue8m0"`` is the smallest power of two that is at least
    ``a * float32(1 / 448)`` (DeepSeek-V3.2, V4), ``"fp32"`` is ``a / 448`` (DeepSeek-V3). The codes are ``x / scale``
    to the nearest E4M3, ties to even.

    Args:
        x: ``[..., K]``, float64, float32, float16 or bfloat16.
        group_size: at least 1.
        scale_format: ``"ue8m0"`` or ``"fp32"``.

    Returns:
        Codes ``[..., K]`` and scales ``[..., ceil(K / group_size)]``, block ``(1, group_size)``.

    Raises:
        ValueError: a shape, dtype or option does not fit.
    """
    data, scales = torch.ops.dsm.fp8_quantize(_matrices("fp8_quantize", x), 1, group_size, scale_format)
    return FP8Tensor(data.view(x.shape), scales.view(*x.shape[:-1], scales.shape[-1]), (1, group_size))


def fp8_block_quantize(
    w: Tensor, block: tuple[int, int] = (128, 128), scale_format: ScaleFormat = "ue8m0"
) -> FP8Tensor:
    """FP8 E4M3 with a scale for each block of a matrix; blocks at the edges may be smaller.

    The scale follows from the block's amax, and the codes from the scale, as in :func:`fp8_quantize`.

    Args:
        w: ``[..., N, K]``, float64, float32, float16 or bfloat16.
        block: rows and columns that share a scale.
        scale_format: ``"ue8m0"`` or ``"fp32"``.

    Returns:
        Codes ``[..., N, K]`` and scales ``[..., ceil(N / block[0]), ceil(K / block[1])]``.

    Raises:
        ValueError: a shape, dtype or option does not fit.
    """
    if w.dim() < 2:
        raise ValueError(f"fp8_block_quantize: w must be [..., N, K], got {list(w.shape)}")
    data, scales = torch.ops.dsm.fp8_quantize(_matrices("fp8_block_quantize", w), *block, scale_format)
    return FP8Tensor(data.view(w.shape), scales.view(*w.shape[:-2], *scales.shape[1:]), block)


@fake("fp8_quantize")
def _(x: Tensor, block_rows: int, block_columns: int, scale_format: str) -> tuple[Tensor, Tensor]:
    matrices, rows, columns = x.shape
    scales = (matrices, -(-rows // block_rows), -(-columns // block_columns))
    dtype = torch.float32 if scale_format == "fp32" else torch.uint8
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(scales, dtype=dtype)


def nvfp4_quantize(x: Tensor, global_scale: Tensor | None = None) -> NVFP4Tensor:
    """NVFP4, byte for byte as NVIDIA's Model Optimizer makes it.

    In float32 and in this order: ``g = amax(x) / 2688`` for each matrix; for 16 neighbours ``t = amax / (6 * g)``, 1
    where that is 0; ``scale = e4m3(clamp(t, 2**-9, 448))``; ``code = e2m1(x / (scale * g))``, ties to even.

    Args:
        x: ``[..., N, K]``, float64, float32, float16 or bfloat16, K a multiple of 16.
        global_scale: float32, ``g`` for all matrices or one for each leading index (each expert); ``None``: from x,
            one for each leading index.

    Returns:
        Codes, scales and global scale: a scalar for one matrix, else ``[...]``; as given, when it was given.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    lead, given = x.shape[:-2], None
    matrices = _matrices("nvfp4_quantize", x, 16)
    if global_scale is not None:
        if global_scale.dtype != torch.float32 or global_scale.shape not in (lead, torch.Size(), torch.Size([1])):
            got = f"{list(global_scale.shape)} {str(global_scale.dtype).removeprefix('torch.')}"
            raise ValueError(f"nvfp4_quantize: global_scale must be [...] = {list(lead)} or [] float32, got {got}")
        global_scale = global_scale.detach()
        given = global_scale.reshape(-1).expand(matrices.shape[0]).contiguous()
    packed, scales, used = torch.ops.dsm.nvfp4_quantize(matrices, given)
    packed, scales = (part.view(*x.shape[:-1], part.shape[-1]) for part in (packed, scales))
    return NVFP4Tensor(packed, scales, used.view(lead) if global_scale is None else global_scale)


@fake("nvfp4_quantize")
def _(x: Tensor, global_scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    packed = x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.uint8)
    scales = x.new_empty((*x.shape[:-1], x.shape[-1] // 16), dtype=torch.float8_e4m3fn)
    return packed, scales, x.new_empty(x.shape[:1], dtype=torch.float32)


def mxfp4_quantize(x: Tensor, rule: MxRule = "ceil") -> MXFP4Tensor:
    """MXFP4: E2M1 codes, ties to even, and a power of two for 32 neighbours.

    Args:
        x: ``[..., K]``, float64, float32, float16 or bfloat16, K a multiple of 32.
        rule: ``"ceil"``: the smallest power of two that is at least ``max(amax, 6 * 2**-126) * float32(1 / 6)``, so
            that nothing saturates (DeepSeek-V4). ``"ocp"``: ``2 ** (floor(log2(amax)) - 2)``, above 6 times which
            values saturate (OCP Microscaling Formats 1.0, section 6.3).

    Returns:
        Codes and scales.

    Raises:
        ValueError: a shape, dtype or option does not fit.
    """
    packed, scales = torch.ops.dsm.mxfp4_quantize(_matrices("mxfp4_quantize", x, 32), rule)
    return MXFP4Tensor(*(part.view(*x.shape[:-1], part.shape[-1]) for part in (packed, scales)))


@fake("mxfp4_quantize")
def _(x: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    packed = x.new_empty((*x.shape[:-1], x.shape[-1] // 2), dtype=torch.uint8)
    return packed, x.new_empty((*x.shape[:-1], x.shape[-1] // 32), dtype=torch.uint8)


def mxfp4_to_fp8(q: MXFP4Tensor, block: tuple[int, int] = (128, 128)) -> FP8Tensor:
    """The same values in FP8 E4M3 with one power of two for each block, exactly.

    The block's scale is its largest group scale over 2**6, as in DeepSeek's converter; groups of zeros do not count.
    That is exact whenever the group scales of a block lie within a factor of 2**14.

    Args:
        q: ``[..., N, K]``.
        block: rows and columns that share a scale; the columns are a multiple of 32.

    Raises:
        ValueError: a block cannot be converted exactly; the message names the first one.
    """
    shape = q.shape
    if len(shape) < 2:
        raise ValueError(f"mxfp4_to_fp8: q must be [..., N, K], got {list(shape)}")
    parts = (q.packed, q.scales.view(torch.uint8))
    matrices = (part.reshape(math.prod(shape[:-2]), shape[-2], part.shape[-1]).contiguous() for part in parts)
    data, scales, exact = torch.ops.dsm.mxfp4_to_fp8(*matrices, *block)
    scales, exact = (part.view(*shape[:-2], *part.shape[1:]) for part in (scales, exact))
    _require("mxfp4_to_fp8", exact, f"block of {block[0]} x {block[1]}", "2**14")
    return FP8Tensor(data.view(shape), scales, block)


@fake("mxfp4_to_fp8")
def _(packed: Tensor, group_scales: Tensor, block_rows: int, block_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    matrices, rows, columns = packed.shape[0], packed.shape[1], 2 * packed.shape[2]
    blocks = (matrices, -(-rows // block_rows), -(-columns // block_columns))
    data = packed.new_empty((matrices, rows, columns), dtype=torch.float8_e4m3fn)
    scales = packed.new_empty(blocks, dtype=torch.uint8)
    return data, scales, packed.new_empty(blocks, dtype=torch.bool)


def mxfp4_to_nvfp4(q: MXFP4Tensor) -> NVFP4Tensor:
    """The same values in NVFP4, exactly: the same codes, each scale twice, and a power of two as global scale.

    The global scale of a matrix is its largest scale over 2**8; groups of zeros do not count. The others must then be
    E4M3 numbers: not below 2**-17 times the largest.

    Args:
        q: ``[..., N, K]``.

    Raises:
        ValueError: a matrix cannot be converted exactly; the message names the first group that stands in the way.
    """
    if len(q.shape) < 2:
        raise ValueError(f"mxfp4_to_nvfp4: q must be [..., N, K], got {list(q.shape)}")
    code = q.scales.view(torch.uint8).int()
    zero = (q.packed.reshape(*q.scales.shape, 16) & 0x77 == 0).all(-1)
    nan = code == 255
    largest = torch.where(zero | nan, 0, code).flatten(-2)
    largest = largest.amax(-1) if largest.shape[-1] else largest.new_zeros(largest.shape[:-1])
    exponent = code - largest[..., None, None] + 8
    _require("mxfp4_to_nvfp4", zero | nan | (exponent >= -9), "group of 32", "2**17")
    powers = torch.exp2(exponent.clamp(-9, 8).float()).masked_fill(nan, torch.nan)
    scales = powers.to(torch.float8_e4m3fn).view(torch.uint8).repeat_interleave(2, -1)
    return NVFP4Tensor(q.packed, scales, torch.exp2((largest - 127 - 8).double()).float())


def _require(operation: str, exact: Tensor, what: str, spread: str) -> None:
    if not bool(exact.all()):
        where = exact.logical_not().nonzero()[0].tolist()
        raise ValueError(
            f"{operation}: q must have scales within {spread} of the largest, but the {what} at {where} has not; "
            "keep it in MXFP4"
        )
