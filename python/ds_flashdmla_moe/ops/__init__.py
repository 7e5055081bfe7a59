# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The operators, one function each, on CPU and CUDA tensors; differentiable where the maths is."""

from .norm_rope import rms_norm, rope, rope_frequencies

__all__ = ["rms_norm", "rope", "rope_frequencies"]
