# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""How far a result may be from the truth, for every dtype, in one table.

An operator accumulates in float32 (float64 for float64) and rounds once. Its result may therefore differ from the
correctly rounded truth by one unit in the last place, plus the accumulation error, which is stated relative to the
largest magnitude of the truth because cancellation makes single elements smaller than the terms they are sums of.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Spacing of neighbouring values relative to the value: half of it is the error of correct rounding.
ULP = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
# Accumulation: float64 and float32 as promised (1e-5 for float32); half types accumulate in float32.
ACCUMULATION = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}
# Below these magnitudes the spacing no longer shrinks.
SMALLEST_NORMAL = {dtype: torch.finfo(dtype).smallest_normal for dtype in ULP}

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def worst_error(result: Tensor, truth: Tensor, *, scale: float | None = None) -> float:
    """The largest error of ``result`` in units of what the table allows: at most 1 passes.

    Args:
        result: what the operator gave, of any floating dtype.
        truth: the float64 value of the formula.
        scale: largest magnitude of the terms that are added up, where the truth itself cancels; default: the truth's.
    """
    if result.shape != truth.shape:
        raise AssertionError(f"shape {tuple(result.shape)} instead of {tuple(truth.shape)}")
    if truth.numel() == 0:
        return 0.0
    dtype = result.dtype
    value, truth = result.detach().double(), truth.detach().double()
    same = (value == truth) | (value.isnan() & truth.isnan())
    if scale is None:
        scale = float(truth.nan_to_num(0, 0, 0).abs().max())
    allowed = ULP[dtype] * truth.abs().clamp_min(SMALLEST_NORMAL[dtype]) + ACCUMULATION[dtype] * scale
    error = torch.where(same, 0.0, (value - truth).abs() / allowed)
    return float(torch.nan_to_num(error, nan=float("inf")).max())


def assert_close(name: str, result: Tensor, truth: Tensor, *, scale: float | None = None) -> None:
    """Prints the worst error and fails when it is beyond the table."""
    worst = worst_error(result, truth, scale=scale)
    print(f"{name}: {worst:.3f} of the allowed error ({str(result.dtype).removeprefix('torch.')})")
    assert worst <= 1, f"{name}: {worst:.3g} times the allowed error"
