# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Cases of normalisation and rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..ops import rms_norm, rope, rope_frequencies
from .case import Case, Draw, Function, Sizes, Work


def _rms_norm_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    rows, hidden = sizes["rows"], sizes["hidden"]
    return {"x": draw(rows, hidden, scale=3), "weight": draw(hidden), "eps": 1e-6}


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _rms_norm_peers(device: str) -> Mapping[str, Function]:
    return {"torch": lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps)}


def _rms_norm_work(sizes: Sizes, width: int) -> Work:
    """x read, y written; squares, their sum, two products."""
    elements = sizes["rows"] * sizes["hidden"]
    return Work(4 * elements, 2 * elements * width)


def _rms_norm_backward_work(sizes: Sizes, width: int) -> Work:
    """x and dy read, dx written; a row's dot product and dx, and the column sums of dweight."""
    elements = sizes["rows"] * sizes["hidden"]
    return Work(10 * elements, 3 * elements * width)


_MAX_POSITIONS = 1 << 20  # of DeepSeek-V4


def _rope_inputs(sizes: Sizes, draw: Draw) -> dict[str, Any]:
    tokens, heads, d = sizes["tokens"], sizes["heads"], sizes["d"]
    return {
        "x": draw(tokens, heads, d),
        "positions": torch.arange(tokens, device=draw.device) * 37 % _MAX_POSITIONS,
        "inv_freq": rope_frequencies(sizes["d_rope"]).to(draw.device),
    }


def _rope_formula(interleaved: bool, inverse: bool) -> Function:
    def formula(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
        # The angle in float32 is part of the operator's definition.
        angle = (positions.float()[:, None, None] * inv_freq.float()).double() * (-1 if inverse else 1)
        kept, rotated = x.tensor_split((x.shape[-1] - 2 * len(inv_freq),), dim=-1)
        if interleaved:
            pairs = torch.complex(rotated[..., 0::2], rotated[..., 1::2])
        else:
            pairs = torch.complex(*rotated.chunk(2, dim=-1))
        turned = pairs * torch.polar(torch.ones_like(angle), angle)
        parts = (turned.real, turned.imag)
        return torch.cat((kept, torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)), -1)

    return formula


def _rope(interleaved: bool, inverse: bool) -> Function:
    return lambda **inputs: rope(**inputs, interleaved=interleaved, inverse=inverse)


def _rope_peers(device: str) -> Mapping[str, Function]:
    return {"torch": reference.rope}


def _rope_work(sizes: Sizes, width: int) -> Work:
    """x read, y written; four products and two sums for every rotated pair."""
    vectors = sizes["tokens"] * sizes["heads"]
    return Work(3 * vectors * sizes["d_rope"], 2 * vectors * sizes["d"] * width)


_SMALL_ROPE = {"tokens": 5, "heads": 3, "d": 24, "d_rope": 16}

CASES = (
    Case(
        operator="rms_norm",
        sizes={"rows": 7, "hidden": 48},
        inputs=_rms_norm_inputs,
        run=rms_norm,
        formula=_rms_norm,
        gradients=("x", "weight"),
        benchmark={
            "cpu": ({"rows": 2048, "hidden": 128}, {"rows": 4096, "hidden": 2048}),
            "cuda": ({"rows": 128, "hidden": 7168}, {"rows": 8192, "hidden": 7168}, {"rows": 65536, "hidden": 2048}),
        },
        work=_rms_norm_work,
        backward_work=_rms_norm_backward_work,
        peers=_rms_norm_peers,
    ),
    Case(
        operator="rope",
        label="interleaved",
        sizes=_SMALL_ROPE,
        inputs=_rope_inputs,
        run=_rope(interleaved=True, inverse=False),
        formula=_rope_formula(interleaved=True, inverse=False),
        gradients=("x",),
        backward="rope",
        benchmark={
            "cpu": (
                {"tokens": 2048, "heads": 4, "d": 32, "d_rope": 32},
                {"tokens": 4096, "heads": 32, "d": 64, "d_rope": 64},
            ),
            "cuda": (
                {"tokens": 128, "heads": 128, "d": 64, "d_rope": 64},
                {"tokens": 8192, "heads": 128, "d": 64, "d_rope": 64},
                {"tokens": 8192, "heads": 64, "d": 512, "d_rope": 64},
                {"tokens": 524288, "heads": 1, "d": 64, "d_rope": 64},
            ),
        },
        work=_rope_work,
        peers=_rope_peers,
    ),
    Case(
        operator="rope",
        label="half-split inverse",
        sizes=_SMALL_ROPE,
        inputs=_rope_inputs,
        run=_rope(interleaved=False, inverse=True),
        formula=_rope_formula(interleaved=False, inverse=True),
        gradients=("x",),
        backward="rope",
    ),
)
