# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The operators, one function each, on CPU and CUDA tensors; differentiable where the maths is."""

from .attention import (
    flash_attn,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_dmla_fwd,
)
from .hyper_connection import hc_head, hc_post, hc_pre
from .indexer import hadamard_quantize, indexer_kl_loss, indexer_logits, indexer_topk, paged_indexer_logits
from .kv_cache import indexer_k_insert, kv_compress, kv_gather, mla_kv_insert, v4_kv_insert
from .mla import merge_attention_states, mla_decode, sparse_mla_decode
from .moe import grouped_gemm, moe_combine, moe_ffn, moe_gate, moe_permute, swiglu
from .norm_rope import (
    rms_norm,
    rope,
    rope_frequencies,
    v4_output_projection,
    v4_q_norm_rope,
    yarn_softmax_scale,
)
from .quant import fp8_block_quantize, fp8_quantize, mxfp4_quantize, mxfp4_to_fp8, mxfp4_to_nvfp4, nvfp4_quantize
from .quant_linear import fp4_linear, fp8_linear
from .sparse_mla import sparse_mla_prefill, v4_attention_indices

__all__ = [
    "flash_attn",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_dmla_fwd",
    "fp4_linear",
    "fp8_block_quantize",
    "fp8_linear",
    "fp8_quantize",
    "grouped_gemm",
    "hadamard_quantize",
    "hc_head",
    "hc_post",
    "hc_pre",
    "indexer_k_insert",
    "indexer_kl_loss",
    "indexer_logits",
    "indexer_topk",
    "kv_compress",
    "kv_gather",
    "merge_attention_states",
    "mla_decode",
    "mla_kv_insert",
    "moe_combine",
    "moe_ffn",
    "moe_gate",
    "moe_permute",
    "mxfp4_quantize",
    "mxfp4_to_fp8",
    "mxfp4_to_nvfp4",
    "nvfp4_quantize",
    "paged_indexer_logits",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "sparse_mla_decode",
    "sparse_mla_prefill",
    "swiglu",
    "v4_attention_indices",
    "v4_kv_insert",
    "v4_output_projection",
    "v4_q_norm_rope",
    "yarn_softmax_scale",
]
