# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""How far a result may be from the truth, for every dtype, in one table.

An operator accumulates in float32 (float64 for float64) and rounds once. Its result may therefore differ from the
correctly rounded truth by one unit in the last place, plus the accumulation error, which is stated relative to the
largest magnitude of the truth because cancellation makes single elements smaller than the terms they are sums of.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "ACCUMULATION",
    "FLOATING",
    "ROUNDED_ROWS",
    "ROUNDED_TERMS",
    "SMALLEST_NORMAL",
    "ULP",
    "Deviation",
    "Distance",
    "deviation",
    "distance",
]

# Spacing of neighbouring values relative to the value: half of it is the error of correct rounding.
ULP = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# Accumulation: float64 and float32 as promised (1e-5 for float32); half types accumulate in float32.
ACCUMULATION = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}
# CUDA's attention in half types multiplies probabilities that are rounded to them (the portable one where query rows
# are many or caches quantised), each off by up to half a unit in the last place. These errors are independent: of many
# keys they average out, of few they stay below one spacing at the largest result.
ROUNDED_TERMS = 1.0
# Hopper's also takes rows of FP8 caches rounded to bfloat16, where scales are no powers of two: each value is off by up
# to half a unit in the last place, 2^-9, and so may be a score, which of few keys is the log-sum-exp.
ROUNDED_ROWS = 2.0**-9
# Below these magnitudes the spacing no longer shrinks.
SMALLEST_NORMAL = {dtype: torch.finfo(dtype).smallest_normal for dtype in ULP}

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Deviation(NamedTuple):
    """The error of the worst element and what the table allows there, both relative to the scale of the truth."""

    error: float
    allowed: float

    @property
    def ratio(self) -> float:
        """At most 1 passes."""
        return self.error / self.allowed


def deviation(result: Tensor, truth: Tensor, *, scale: float | None = None, inherited: float = 0.0) -> Deviation:
    """Where ``result`` is farthest from ``truth`` in units of what is allowed.

    Args:
        result: what the operator gave; floating, or of another dtype, which must be exact.
        truth: the float64 value of the formula.
        scale: largest magnitude of the terms that are added up, where the truth itself cancels; default: the truth's.
        inherited: error of the values that the result is computed from, relative to the scale: a backward pass that
            reads results which the forward pass stored in bfloat16 starts from one ulp of that, in whatever dtype its
            own result is.

    Raises:
        ValueError: the shapes differ.
    """
    if result.shape != truth.shape:
        raise ValueError(f"shape {tuple(result.shape)} instead of {tuple(truth.shape)}")
    dtype = result.dtype if result.dtype in ULP else torch.float64
    value, truth = result.detach().double(), truth.detach().double()
    if truth.numel() == 0:
        return Deviation(0.0, ULP[dtype])
    if scale is None:
        scale = float(truth.nan_to_num(0, 0, 0).abs().max())
    scale = max(scale, SMALLEST_NORMAL[dtype])
    allowed = ULP[dtype] * truth.abs().clamp_min(SMALLEST_NORMAL[dtype])
    allowed = allowed + (ACCUMULATION[dtype] + inherited) * scale
    same = (value == truth) | (value.isnan() & truth.isnan())
    error = torch.where(same, 0.0, (value - truth).abs()).nan_to_num(nan=float("inf"))
    # An infinite truth that was missed has an infinite error, and must not be excused by an infinite allowance.
    allowed = allowed.nan_to_num(ULP[dtype] * scale, ULP[dtype] * scale)
    worst = int((error / allowed).argmax())
    return Deviation(float(error.flatten()[worst]) / scale, float(allowed.flatten()[worst]) / scale)


class Distance(NamedTuple):
    """From the truth: of the farthest element relative to the largest one, and of all as root mean squares."""

    worst: float
    rms: float


def distance(result: Tensor, truth: Tensor) -> Distance:
    """Without judging. Elements whose truth is not finite count as infinitely far, or not at all if they are equal."""
    value, truth = result.detach().double(), truth.detach().double()
    if truth.numel() == 0:
        return Distance(0.0, 0.0)
    same = (value == truth) | (value.isnan() & truth.isnan())
    error = torch.where(same, 0.0, (value - truth).abs()).nan_to_num(torch.inf, torch.inf)
    size = truth.nan_to_num(0, 0, 0).abs().clamp_min(SMALLEST_NORMAL[torch.float64])
    return Distance(float(error.max() / size.max()), float(error.norm() / size.norm()))
