# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Modules over the library's operators, and the byte-level language model made of them."""

from ..config import LanguageModelConfig
from . import library
from .attention import DMLAAttention, LatentCache
from .language_model import LanguageModel
from .moe import MoE, Routing
from .norm import RMSNorm
from .operators import OperatorSet

__all__ = [
    "DMLAAttention",
    "LanguageModel",
    "LanguageModelConfig",
    "LatentCache",
    "MoE",
    "OperatorSet",
    "RMSNorm",
    "Routing",
    "library",
]
