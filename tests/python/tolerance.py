# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Comparison with the truth by the table of :mod:`ds_flashdmla_moe.accuracy`, printed before it is judged."""

from __future__ import annotations

from torch import Tensor

from ds_flashdmla_moe.accuracy import ACCUMULATION, FLOATING, SMALLEST_NORMAL, ULP, deviation

__all__ = ["ACCUMULATION", "FLOATING", "SMALLEST_NORMAL", "ULP", "assert_close", "worst_error"]


def worst_error(result: Tensor, truth: Tensor, *, scale: float | None = None) -> float:
    """The largest error of ``result`` in units of what the table allows: at most 1 passes."""
    return deviation(result, truth, scale=scale).ratio


def assert_close(name: str, result: Tensor, truth: Tensor, *, scale: float | None = None) -> None:
    """Prints the worst error and fails when it is beyond the table."""
    worst = worst_error(result, truth, scale=scale)
    print(f"{name}: {worst:.3f} of the allowed error ({str(result.dtype).removeprefix('torch.')})")
    assert worst <= 1, f"{name}: {worst:.3g} times the allowed error"
