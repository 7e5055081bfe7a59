# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""DeepSeek-style attention and mixture-of-experts operators for CPU and NVIDIA GPUs."""

from . import ops
from ._library import VERSION as __version__

__all__ = ["__version__", "ops"]
