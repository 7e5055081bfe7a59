# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Quantised tensors and how they are made."""

from .ops.quant import (
    fp8_block_quantize,
    fp8_quantize,
    mxfp4_quantize,
    mxfp4_to_fp8,
    mxfp4_to_nvfp4,
    nvfp4_quantize,
)
from .qtensor import FP8Tensor, MXFP4Tensor, NVFP4Tensor, QTensor

__all__ = [
    "FP8Tensor",
    "MXFP4Tensor",
    "NVFP4Tensor",
    "QTensor",
    "fp8_block_quantize",
    "fp8_quantize",
    "mxfp4_quantize",
    "mxfp4_to_fp8",
    "mxfp4_to_nvfp4",
    "nvfp4_quantize",
]
