# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Quantised tensors and how they are made."""

from .ops.quant_linear import linear
from .qtensor import FP8Tensor, MXFP4Tensor, NVFP4Tensor, QTensor

__all__ = ["FP8Tensor", "MXFP4Tensor", "NVFP4Tensor", "QTensor", "linear"]
