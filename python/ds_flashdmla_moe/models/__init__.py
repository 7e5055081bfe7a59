# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Whole language models from checkpoint folders."""

from .language_model import LanguageModel
from .load import load_model

__all__ = ["LanguageModel", "load_model"]
