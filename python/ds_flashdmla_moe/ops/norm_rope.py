# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Normalisation and rotary embedding."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._register import accumulator_dtype, adjacent, fake, no_double_backward


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
    (float64 for float64 input) and rounded once. The gradient with respect to x is the inverse rotation. To rotate the
    first dimensions, pass ``x[..., :d_rope]``.

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
    tokens, token_positions = _tokens("rope", "x", x, positions)
    y = torch.ops.dsm.rope(tokens, token_positions, inv_freq, interleaved, inverse)
    return y.view(x.shape)  # type: ignore[no-any-return]


def _tokens(operator: str, argument: str, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """All leading dimensions of the heads as one, and each token's position."""
    if x.dim() < 3:
        raise ValueError(f"{operator}: {argument} must be [..., tokens, heads, d], got {list(x.shape)}")
    lead = x.shape[:-2]
    try:
        flat_positions = positions.expand(lead).reshape(-1).contiguous()
    except RuntimeError:
        raise ValueError(
            f"{operator}: positions must broadcast to [..., tokens] = {list(lead)}, got {list(positions.shape)}"
        ) from None
    return x.flatten(0, -3), flat_positions


@fake("rope")
def _(x: Tensor, positions: Tensor, inv_freq: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _rope_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, positions, inv_freq, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(positions, inv_freq)


def _rope_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
    positions, inv_freq = ctx.saved_tensors
    dy = adjacent(dy)
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


def yarn_softmax_scale(d_qk: int, factor: float, mscale: float = 1.0) -> float:
    """The scale of attention scores that goes with YaRN in DeepSeek-V3 and V3.2: ``m² / sqrt(d_qk)``.

    ``m = 0.1 * mscale * ln(factor) + 1``; for factor 1 the scale is the usual one. DeepSeek-V4 has no such correction.

    Args:
        d_qk: width of a query before any absorption: 192 in DeepSeek-V3.
        factor: how many times the trained context is stretched, at least 1; see :func:`rope_frequencies`.
        mscale: strength of the correction.

    Raises:
        ValueError: an argument is out of its range.

    Source: Peng et al. 2023, arXiv 2309.00071; DeepSeek-V3 reference code.
    """
    if d_qk <= 0:
        raise ValueError(f"yarn_softmax_scale: d_qk must be greater than 0, got {d_qk}")
    if not (factor >= 1 and math.isfinite(factor)):
        raise ValueError(f"yarn_softmax_scale: factor must be a number of at least 1, got {factor}")
    if not math.isfinite(mscale):
        raise ValueError(f"yarn_softmax_scale: mscale must be a number, got {mscale}")
    m = 0.1 * mscale * math.log(factor) + 1
    return float(d_qk**-0.5 * m * m)


def v4_q_norm_rope(q: Tensor, positions: Tensor, inv_freq: Tensor, eps: float = 1e-6) -> Tensor:
    """DeepSeek-V4's queries: every head RMS-normalised without a weight, then its last dimensions rotated, interleaved.

    Computed in float32 (float64 for float64 input) from end to end and rounded once, as production kernels do.
    DeepSeek's reference code rounds the squares, their mean, its root and the normalised head to bfloat16 on the way;
    the two differ by one or two units of bfloat16's last place.

    Args:
        q: ``[..., tokens, heads, d]``, float64, float32, float16 or bfloat16.
        positions: int64, of a shape that broadcasts to ``[..., tokens]``.
        inv_freq: ``[pairs]`` float32, radians per position, ``2 * pairs <= d``; see :func:`rope_frequencies`.
        eps: added to the mean square.

    Returns:
        A contiguous tensor of q's shape and dtype.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Source: DeepSeek-V4 reference code.
    """
    tokens, token_positions = _tokens("v4_q_norm_rope", "q", q, positions)
    y, _ = torch.ops.dsm.v4_q_norm_rope(tokens, token_positions, inv_freq, eps)
    return y.view(q.shape)  # type: ignore[no-any-return]


@fake("v4_q_norm_rope")
def _(q: Tensor, positions: Tensor, inv_freq: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=accumulator_dtype(q))


@fake("v4_q_norm_rope_backward")
def _(dy: Tensor, q: Tensor, positions: Tensor, inv_freq: Tensor, rstd: Tensor) -> Tensor:
    return q.new_empty(q.shape)


def _v4_q_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:3], output[1])


def _v4_q_backward(ctx: Any, dy: Tensor, drstd: Tensor) -> tuple[Tensor, None, None, None]:
    dy = adjacent(dy)
    return torch.ops.dsm.v4_q_norm_rope_backward(dy, *ctx.saved_tensors), None, None, None


torch.library.register_autograd("dsm::v4_q_norm_rope", _v4_q_backward, setup_context=_v4_q_setup)
no_double_backward("v4_q_norm_rope_backward")


def v4_output_projection(o: Tensor, positions: Tensor, inv_freq: Tensor, wo_a: Tensor, groups: int) -> Tensor:
    """The first half of DeepSeek-V4's output projection: heads rotated back, then projected in groups of neighbours.

    The last ``2 * len(inv_freq)`` dimensions of each head are turned back by the query's position, interleaved, and
    rounded to o's dtype; the heads of group g, flattened, are then multiplied by rows ``g * rank`` to
    ``(g + 1) * rank`` of wo_a. Sums are float32 (float64 for float64 input) and rounded once. The second half is a
    linear layer of its own, ``wo_b``. Differentiable in o and wo_a.

    Args:
        o: ``[..., tokens, heads, d]``, attention's output; float64, float32, float16 or bfloat16.
        positions: int64, of the queries, of a shape that broadcasts to ``[..., tokens]``.
        inv_freq: ``[pairs]`` float32, radians per position, ``2 * pairs <= d``; see :func:`rope_frequencies`.
        wo_a: ``[groups * rank, heads / groups * d]`` of o's dtype.
        groups: divides heads and wo_a's rows.

    Returns:
        ``[..., tokens, groups * rank]`` of o's dtype.

    Raises:
        ValueError: a shape, dtype, device or number does not fit.

    Source: DeepSeek-V4 reference code.
    """
    tokens, token_positions = _tokens("v4_output_projection", "o", o, positions)
    if wo_a.dim() != 2:
        raise ValueError(
            f"v4_output_projection: wo_a must be [groups * rank, heads / groups * d], got {list(wo_a.shape)}"
        )
    z = torch.ops.dsm.v4_output_projection(tokens, token_positions, inv_freq, wo_a, groups)
    return z.view(*o.shape[:-2], wo_a.shape[0])  # type: ignore[no-any-return]


@fake("v4_output_projection")
def _(o: Tensor, positions: Tensor, inv_freq: Tensor, wo_a: Tensor, groups: int) -> Tensor:
    return o.new_empty(o.shape[0], wo_a.shape[0])


@fake("v4_output_projection_backward")
def _(
    dz: Tensor,
    o: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    wo_a: Tensor,
    groups: int,
    need_do: bool,
    need_dwo_a: bool,
) -> tuple[Tensor, Tensor]:
    return o.new_empty(o.shape if need_do else 0), wo_a.new_empty(wo_a.shape if need_dwo_a else 0)


def _v4_output_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.groups = inputs[4]
    ctx.save_for_backward(*inputs[:4])


def _v4_output_backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
    need_do, need_dwo_a = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    dz = adjacent(dz)
    d_o, dwo_a = torch.ops.dsm.v4_output_projection_backward(dz, *ctx.saved_tensors, ctx.groups, need_do, need_dwo_a)
    return d_o if need_do else None, None, None, dwo_a if need_dwo_a else None, None


torch.library.register_autograd("dsm::v4_output_projection", _v4_output_backward, setup_context=_v4_output_setup)
no_double_backward("v4_output_projection_backward")
