# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Cases of normalisation and rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..ops import rms_norm
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
)
