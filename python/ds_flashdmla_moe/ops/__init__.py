# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The operators, one function each, on CPU and CUDA tensors; differentiable where the maths is."""

from .attention import (
    flash_attn,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_dmla_fwd,
)
from .indexer import hadamard_quantize, indexer_kl_loss, indexer_logits, indexer_topk, paged_indexer_logits
from .kv_cache import indexer_k_insert, kv_compress, kv_gather, mla_kv_insert, v4_kv_insert
from .moe import grouped_gemm, moe_combine, moe_ffn, moe_gate, moe_permute, swiglu
from .norm_rope import rms_norm, rope, rope_frequencies

__all__ = [
    "flash_attn",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_dmla_fwd",
    "grouped_gemm",
    "hadamard_quantize",
    "indexer_k_insert",
    "indexer_kl_loss",
    "indexer_logits",
    "indexer_topk",
    "kv_compress",
    "kv_gather",
    "mla_kv_insert",
    "moe_combine",
    "moe_ffn",
    "moe_gate",
    "moe_permute",
    "paged_indexer_logits",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "swiglu",
    "v4_kv_insert",
]
