# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Quantised tensors, how they are made, and products with them."""

from .ops.quant import (
    fp8_block_quantize,
    fp8_quantize,
    mxfp4_quantize,
    mxfp4_to_fp8,
    mxfp4_to_nvfp4,
    nvfp4_quantize,
)
from .ops.quant_linear import linear
from .qtensor import FP8Tensor, MXFP4Tensor, NVFP4Tensor, QTensor

__all__ = [
    "FP8Tensor",
    "MXFP4Tensor",
    "NVFP4Tensor",
    "QTensor",
    "fp8_block_quantize",
    "fp8_quantize",
    "linear",
    "mxfp4_quantize",
    "mxfp4_to_fp8",
    "mxfp4_to_nvfp4",
    "nvfp4_quantize",
]
