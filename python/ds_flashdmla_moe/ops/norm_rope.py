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


def rope(x: Tensor, positions: Tensor, inv_freq: Tensor, interleaved: bool = True, inverse: bool = False) -> Tensor:
    """Rotary position embedding of the last ``2 * len(inv_freq)`` dimensions of each head; the others are copied.

    Pair i is rotated by the angle ``positions * inv_freq[i]``, rounded to float32; the rotation is computed in float32
    (float64 for float64 input) and rounded once. The gradient with respect to x is the inverse rotation.

    Args:
        x: ``[..., tokens, heads, d]``, float64, float32, float16 or bfloat16.
        positions: int64, of a shape that broadcasts to ``[..., tokens]``, such as ``[tokens]`` for all of a batch.
        inv_freq: ``[pairs]`` float32, radians per position, ``2 * pairs <= d``; see :func:`rope_frequencies`.
        interleaved: pair i is elements ``(2i, 2i + 1)`` of the rotated part (DeepSeek); otherwise ``(i, pairs + i)``
            (GPT-NeoX, LLaMA).
        inverse: rotate by the opposite angle.

    Returns:
        A contiguous tensor of x's shape and dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Source: Su et al. 2021, arXiv 2104.09864; DeepSeek-V4 reference code.
    """
    if x.dim() < 3:
        raise ValueError(f"rope: x must be [..., tokens, heads, d], got {list(x.shape)}")
    lead = x.shape[:-2]
    try:
        flat_positions = positions.expand(lead).reshape(-1).contiguous()
    except RuntimeError:
        raise ValueError(
            f"rope: positions must broadcast to [..., tokens] = {list(lead)}, got {list(positions.shape)}"
        ) from None
    y = torch.ops.dsm.rope(x.flatten(0, -3), flat_positions, inv_freq, interleaved, inverse)
    return y.view(x.shape)  # type: ignore[no-any-return]


@fake("rope")
def _(x: Tensor, positions: Tensor, inv_freq: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _rope_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, positions, inv_freq, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(positions, inv_freq)


def _rope_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
    positions, inv_freq = ctx.saved_tensors
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    dx = torch.ops.dsm.rope(dy, positions, inv_freq, ctx.interleaved, not ctx.inverse)
    return dx, None, None, None, None


torch.library.register_autograd("dsm::rope", _rope_backward, setup_context=_rope_setup)


def rope_frequencies(
    d_rope: int,
    base: float = 10000.0,
    *,
    factor: float = 1.0,
    original_length: float = 4096,
    beta_fast: float = 32,
    beta_slow: float = 1,
) -> Tensor:
    """The frequencies for :func:`rope`: ``base ** (-2i / d_rope)`` for pair i, stretched by YaRN when ``factor > 1``.

    YaRN: pairs that turn more than ``beta_fast`` times within ``original_length`` positions keep their frequency, those
    that turn less than ``beta_slow`` times get it divided by ``factor``, with a linear ramp between.

    Args:
        d_rope: number of rotated dimensions, even.
        base: greater than 1.
        factor: how many times the trained context is stretched, at least 1.
        original_length: trained context length in tokens.
        beta_fast: turns, at least ``beta_slow``.
        beta_slow: turns, greater than 0.

    Returns:
        ``[d_rope / 2]`` float32 on the CPU.

    Raises:
        ValueError: an argument is out of its range.

    Source: Peng et al. 2023, arXiv 2309.00071, in the form of the DeepSeek-V3 and V4 reference code.
    """
    return torch.ops.dsm.rope_frequencies(  # type: ignore[no-any-return]
        d_rope, base, factor, original_length, beta_fast, beta_slow
    )


@fake("rope_frequencies")
def _(d_rope: int, base: float, factor: float, original_length: float, beta_fast: float, beta_slow: float) -> Tensor:
    return torch.empty(d_rope // 2, dtype=torch.float32)
