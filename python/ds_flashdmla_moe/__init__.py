# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""DeepSeek-style attention and mixture-of-experts operators for CPU and NVIDIA GPUs."""

from . import flash_mla, models, nn, ops, quant
from ._library import VERSION as __version__
from .choices import explain
from .moe import MoEWeights, moe_forward_unfused, moe_megakernel_fwd
from .ops.attention import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_dmla_fwd,
)

__all__ = [
    "MoEWeights",
    "__version__",
    "explain",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_dmla_fwd",
    "flash_mla",
    "models",
    "moe_forward_unfused",
    "moe_megakernel_fwd",
    "nn",
    "ops",
    "quant",
]
