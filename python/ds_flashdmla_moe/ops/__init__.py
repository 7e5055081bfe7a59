# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The operators, one function each, on CPU and CUDA tensors; differentiable where the maths is."""

from .attention import (
    flash_attn,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_dmla_fwd,
)
from .moe import grouped_gemm, moe_combine, moe_ffn, moe_gate, moe_permute, swiglu
from .norm_rope import rms_norm, rope, rope_frequencies
from .quant import fp8_block_quantize, fp8_quantize, mxfp4_quantize, mxfp4_to_fp8, mxfp4_to_nvfp4, nvfp4_quantize

__all__ = [
    "flash_attn",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_dmla_fwd",
    "fp8_block_quantize",
    "fp8_quantize",
    "grouped_gemm",
    "moe_combine",
    "moe_ffn",
    "moe_gate",
    "moe_permute",
    "mxfp4_quantize",
    "mxfp4_to_fp8",
    "mxfp4_to_nvfp4",
    "nvfp4_quantize",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "swiglu",
]
