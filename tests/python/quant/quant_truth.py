# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The quantisers' definitions in numpy, with exactly the float32 operations that they name."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

F = np.float32
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
# All finite magnitudes of E4M3 by code: subnormal below 8, bias 7, the largest 448.
E4M3 = np.array([(c % 8 + 8 * (c >= 8)) * 2.0 ** (max(c // 8, 1) - 10) for c in range(127)])


def nearest(grid: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Index of the value of an ascending grid that is nearest to |x|; a tie goes to the even index."""
    magnitude = np.minimum(np.abs(x.astype(np.float64)), grid[-1])
    above = np.searchsorted(grid, magnitude, side="left").clip(1, len(grid) - 1)
    middle = (grid[above - 1] + grid[above]) / 2
    up = (magnitude > middle) | ((magnitude == middle) & (above % 2 == 0))
    return np.where(up, above, above - 1).astype(np.uint8)


def e4m3(x: np.ndarray) -> np.ndarray:
    return nearest(E4M3, x) | (np.signbit(x).astype(np.uint8) << 7)


def packed_e2m1(x: np.ndarray) -> np.ndarray:
    codes = nearest(E2M1, x) | (np.signbit(x).astype(np.uint8) << 3)
    return codes[..., 0::2] + 16 * codes[..., 1::2]


def power_of_two_above(x: np.ndarray) -> np.ndarray:
    """The byte of the smallest power of two >= x."""
    mantissa, exponent = np.frexp(x.astype(np.float64))
    return (np.where(mantissa == 0.5, exponent - 1, exponent) + 127).clip(0, 254).astype(np.uint8)


def fp8(x: Tensor, block: tuple[int, int], scale_format: str) -> tuple[Tensor, Tensor]:
    """Codes and scales (bytes, or float32) of a matrix, block by block."""
    values = x.float().numpy()
    rows, columns = (math.ceil(n / b) for n, b in zip(values.shape, block, strict=True))
    codes = np.zeros(values.shape, np.uint8)
    scales = np.zeros((rows, columns), np.uint8 if scale_format == "ue8m0" else F)
    for i in range(rows):
        for j in range(columns):
            at = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            a = np.maximum(np.abs(values[at]).max(), F(1e-4))
            if scale_format == "ue8m0":
                scales[i, j] = power_of_two_above(a * F(1 / 448))
                codes[at] = e4m3(values[at] / F(2.0 ** (int(scales[i, j]) - 127)))
            else:
                scales[i, j] = a / F(448)
                codes[at] = e4m3(values[at] / scales[i, j])
    return torch.from_numpy(codes), torch.from_numpy(scales)


def nvfp4(x: Tensor, g: float | None = None) -> tuple[Tensor, Tensor, float]:
    """Packed codes, scale bytes and global scale of a matrix that is not all zero, as Model Optimizer makes them."""
    values = x.float().numpy().reshape(*x.shape[:-1], -1, 16)
    factor = np.abs(values).max() / F(2688) if g is None else F(g)
    t = np.abs(values).max(-1, keepdims=True) / (F(6) * factor)
    t = np.where(t == 0, F(1), t).clip(F(2.0**-9), F(448))
    scale = e4m3(t)
    scaled = values / (E4M3[scale].astype(F) * factor)
    assert scaled.dtype == F
    scaled = np.where(scaled < 0, scaled, np.abs(scaled)).reshape(x.shape)  # the sign is that of x < 0
    return torch.from_numpy(packed_e2m1(scaled)), torch.from_numpy(scale[..., 0]), float(factor)


def mxfp4(x: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    values = x.float().numpy().reshape(*x.shape[:-1], -1, 32)
    amax = np.abs(values).max(-1, keepdims=True)
    if rule == "ceil":
        scale = power_of_two_above(np.maximum(amax, F(6 * 2.0**-126)) * F(1 / 6))
    else:
        exponent = np.frexp(np.maximum(amax, F(2.0**-149)))[1] - 1
        scale = (exponent - 2 + 127).clip(0, 254).astype(np.uint8)
    scaled = values / np.exp2(scale.astype(np.float64) - 127)
    return torch.from_numpy(packed_e2m1(scaled.reshape(x.shape))), torch.from_numpy(scale[..., 0])


def half_step(grid: np.ndarray) -> Callable[[Tensor], Tensor]:
    """How far a magnitude may be from the nearest value of the grid, by the gap it lies in."""
    edges = torch.from_numpy(grid)

    def bound(magnitude: Tensor) -> Tensor:
        above = torch.searchsorted(edges, magnitude.contiguous()).clamp(1, len(edges) - 1)
        return (edges[above] - edges[above - 1]) / 2

    return bound
