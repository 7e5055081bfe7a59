# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Linear layers with quantised weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..qtensor import FP8Tensor, MXFP4Tensor, NVFP4Tensor, QTensor
from ._register import adjacent, fake, no_double_backward
from ._weights import ActivationFormat, format_name, scale_bytes


def fp8_linear(
    x: Tensor,
    data: Tensor,
    scales: Tensor,
    block: tuple[int, int] = (128, 128),
    activation_format: ActivationFormat | None = None,
) -> Tensor:
    """``y = x · Wᵀ`` with FP8 weights: ``W = code * scale``, one scale for each block. Differentiable in x.

    Products are accumulated in float32 (float64 for float64 x) and rounded once to x's dtype. Before that rounding
    the error is at most ``(min(K, 256) + K / 256 + 2) * 2**-24`` times the sum of the products' magnitudes (and
    ``2**-24`` of it more with float32 scales, whose products with the codes are rounded to float32).

    The gradient is ``dx = dy · W``; codes and scales have none, and the rounding of activations is passed straight
    through, as if it were not there.

    Args:
        x: ``[..., K]``, any floating dtype.
        data: float8_e4m3fn ``[N, K]``.
        scales: float8_e8m0fnu (or uint8, the same bits) or float32 ``[ceil(N / block[0]), ceil(K / block[1])]``.
        block: rows and columns that share a scale; the last blocks may be partial.
        activation_format: ``None`` (or ``"none"``): x as it comes. ``"fp8"``: each row of x is first rounded to FP8 in
            groups of 128 channels, the last of which may be shorter, with the scale
            ``s = 2**ceil(log2(max(max|x|, 1e-4) / 448))``: ``x = e4m3(x / s) * s``. NaN or infinity make their group
            NaN.

    Returns:
        ``[..., N]`` in x's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Source: ``Lin8`` of the DeepSeek-V4 reference code, whose kernel scales sums of 128 products instead of codes: the
    same value within the bound above.
    """
    rows = _rows("fp8_linear", x)
    y: Tensor = torch.ops.dsm.fp8_linear(
        rows, data.contiguous(), scale_bytes(scales), list(block), format_name(activation_format)
    )
    return y.view(*x.shape[:-1], y.shape[-1])


def fp4_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    global_scale: Tensor | None = None,
    activation_format: ActivationFormat | None = None,
) -> Tensor:
    """``y = x · Wᵀ`` with MXFP4 or NVFP4 weights: ``W = (code * scale) * global_scale``. Differentiable in x.

    Accumulation, rounding, error and gradient are those of :func:`fp8_linear`; with a global scale each weight is
    rounded to float32.

    Args:
        x: ``[..., K]``, any floating dtype.
        packed: uint8 (or int8) ``[N, K / 2]``: two E2M1 codes in a byte, the low nibble is the element of even k.
        scales: MXFP4: float8_e8m0fnu (or uint8, the same bits) ``[N, K / 32]``; NVFP4: float8_e4m3fn ``[N, K / 16]``.
        global_scale: of NVFP4: float32, a factor for all or ``[N]``; ``None`` for MXFP4.
        activation_format: as in :func:`fp8_linear`.

    Returns:
        ``[..., N]`` in x's dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Source: ``Lin4`` of the DeepSeek-V4 reference code; NVIDIA ModelOpt for NVFP4.
    """
    rows = _rows("fp4_linear", x)
    factor = None if global_scale is None else global_scale.contiguous()
    y: Tensor = torch.ops.dsm.fp4_linear(
        rows, packed.contiguous(), scale_bytes(scales), factor, format_name(activation_format)
    )
    return y.view(*x.shape[:-1], y.shape[-1])


def linear(x: Tensor, q: QTensor, activation_format: ActivationFormat | None = None) -> Tensor:
    """``y = x · Wᵀ`` with a quantised weight ``[N, K]`` of any format: :func:`fp8_linear` or :func:`fp4_linear`."""
    if isinstance(q, FP8Tensor):
        return fp8_linear(x, q.data, q.scales, q.block, activation_format)
    if isinstance(q, NVFP4Tensor):
        return fp4_linear(x, q.packed, q.scales, q.global_scale, activation_format)
    if isinstance(q, MXFP4Tensor):
        return fp4_linear(x, q.packed, q.scales, None, activation_format)
    raise ValueError(f"linear: q must be an FP8Tensor, MXFP4Tensor or NVFP4Tensor, got {type(q).__name__}")


def _rows(name: str, x: Tensor) -> Tensor:
    """x as [rows, K], with adjacent elements."""
    if x.dim() == 0:
        raise ValueError(f"{name}: x must have at least one dimension, got a scalar")
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return adjacent(rows)


# --- shapes and derivatives ---


def _forward_shape(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


fake("fp8_linear")(_forward_shape)
fake("fp4_linear")(_forward_shape)


@fake("fp8_linear_backward")
def _(dy: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return dy.new_empty(dy.shape[0], weight.shape[1])


@fake("fp4_linear_backward")
def _(dy: Tensor, packed: Tensor, *rest: Any) -> Tensor:
    return dy.new_empty(dy.shape[0], 2 * packed.shape[1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, scales, third, _ = inputs  # the third is FP8's block or NVFP4's global scale
    ctx.third = None if isinstance(third, Tensor) else third
    ctx.save_for_backward(weight, scales, *([third] if isinstance(third, Tensor) else []))


def _derivative(backward: Callable[..., Tensor]) -> Callable[..., tuple[Tensor | None, ...]]:
    def differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, scales, *factor = ctx.saved_tensors
        dy = adjacent(dy)
        return backward(dy, weight, scales, factor[0] if factor else ctx.third), None, None, None, None

    return differentiate


for _name in ("fp8_linear", "fp4_linear"):
    _backward = _derivative(getattr(torch.ops.dsm, f"{_name}_backward"))
    torch.library.register_autograd(f"dsm::{_name}", _backward, setup_context=_setup)
    no_double_backward(f"{_name}_backward")
