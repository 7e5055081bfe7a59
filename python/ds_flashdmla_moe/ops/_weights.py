# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Weights as operators take them: a matrix, or the codes of a quantised one with its scales."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..qtensor import FP8Tensor, NVFP4Tensor, QTensor

ActivationFormat = Literal["none", "fp8"]


class WeightParts(NamedTuple):
    """``scales`` is None where ``data`` are numbers; ``block`` is FP8's."""

    data: Tensor
    scales: Tensor | None = None
    global_scale: Tensor | None = None
    block: tuple[int, int] = (1, 1)


def parts_of(weight: Tensor | QTensor) -> WeightParts:
    """The contiguous tensors that a weight consists of."""
    if isinstance(weight, Tensor):
        return WeightParts(weight.contiguous())
    if isinstance(weight, FP8Tensor):
        return WeightParts(weight.data.contiguous(), scale_bytes(weight.scales), None, weight.block)
    factor = weight.global_scale.contiguous() if isinstance(weight, NVFP4Tensor) else None
    return WeightParts(weight.packed.contiguous(), scale_bytes(weight.scales), factor)


def scale_bytes(scales: Tensor) -> Tensor:
    """Contiguous; E8M0 as uint8, because torch's stable interface for C++ does not know that type yet."""
    scales = scales.contiguous()
    return scales.view(torch.uint8) if scales.dtype == torch.float8_e8m0fnu else scales


def format_name(activation_format: ActivationFormat | None) -> str:
    return "none" if activation_format is None else activation_format
