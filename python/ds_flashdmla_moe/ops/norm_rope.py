# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Normalisation and rotary embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._register import accumulator_dtype, fake, no_double_backward


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """Root-mean-square normalisation: ``y = x / sqrt(mean(x²) + eps) * weight`` over the last dimension.

    Computed in float32 (float64 for float64 input) and rounded once.

    Args:
        x: ``[..., hidden]``, float64, float32, float16 or bfloat16.
        weight: ``[hidden]`` in x's dtype or float32; ``None``: no scaling.
        eps: added to the mean square.

    Returns:
        A tensor of x's shape and dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """
    if x.dim() == 0:
        raise ValueError("rms_norm: x must have at least one dimension, got a scalar")
    rows = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(0, 0)
    y, _ = torch.ops.dsm.rms_norm(rows, weight, eps)
    return y.view(x.shape)  # type: ignore[no-any-return]


@fake("rms_norm")
def _(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:1], dtype=accumulator_dtype(x))


@fake("rms_norm_backward")
def _(dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx: Any, dy: Tensor, drstd: Tensor) -> tuple[Tensor, Tensor | None, None]:
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = torch.ops.dsm.rms_norm_backward(dy.contiguous(), x, weight, rstd)
    return dx, None if weight is None else dweight, None


torch.library.register_autograd("dsm::rms_norm", _backward, setup_context=_setup)
no_double_backward("rms_norm_backward")
