# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The library's own operators as the set that modules take by default; its counterpart is ``reference``."""

from ..moe import moe_forward_unfused, moe_megakernel_fwd
from ..ops import flash_dmla_fwd, moe_gate, rms_norm, rope

__all__ = ["flash_dmla_fwd", "moe_forward_unfused", "moe_gate", "moe_megakernel_fwd", "rms_norm", "rope"]
