# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Rotary embedding in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(x: Tensor, positions: Tensor, inv_freq: Tensor, interleaved: bool = True, inverse: bool = False) -> Tensor:
    """The formula in complex numbers: the pair (a, b) is a + ib, times exp(± i angle)."""
    angle = (positions.float()[..., None, None] * inv_freq).double()
    turn = torch.polar(torch.ones_like(angle), -angle if inverse else angle)
    kept, part = x.double().tensor_split([x.shape[-1] - 2 * len(inv_freq)], dim=-1)
    halves = part.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else part.chunk(2, dim=-1)
    z = torch.complex(*halves) * turn
    pairs = torch.stack((z.real, z.imag), -1 if interleaved else -2).flatten(-2)
    return torch.cat((kept, pairs), -1)


def rounded(
    x: Tensor, positions: Tensor, inv_freq: Tensor, dtype: torch.dtype, interleaved: bool = True, inverse: bool = False
) -> Tensor:
    """The same for x in the dtype, with the roundings of the definition: a float64 rotation would round to the other
    side of a tie once in some thousand elements, which shows in sums of few."""
    if dtype == torch.float64:
        return rotated(x, positions, inv_freq, interleaved, inverse)
    angle = (positions.float()[..., None, None] * inv_freq).double()
    cos, sin = angle.cos().float(), angle.sin().float() * (-1 if inverse else 1)
    kept, part = x.float().tensor_split([x.shape[-1] - 2 * len(inv_freq)], dim=-1)
    a, b = part.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else part.chunk(2, dim=-1)
    pairs = torch.stack((a * cos - b * sin, a * sin + b * cos), -1 if interleaved else -2).flatten(-2)
    return torch.cat((kept, pairs), -1).to(dtype).double()
