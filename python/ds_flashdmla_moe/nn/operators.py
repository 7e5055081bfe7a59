# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The operators a model is made of, as one replaceable set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

__all__ = ["OperatorSet"]


class OperatorSet(Protocol):
    """What the modules call. ``ds_flashdmla_moe.nn.library`` and ``ds_flashdmla_moe.reference`` are such sets."""

    @property
    def flash_dmla_fwd(self) -> Callable[..., Any]: ...
    @property
    def moe_forward_unfused(self) -> Callable[..., Tensor]: ...
    @property
    def moe_megakernel_fwd(self) -> Callable[..., Tensor]: ...
    @property
    def moe_gate(self) -> Callable[..., tuple[Tensor, Tensor]]: ...
    @property
    def rms_norm(self) -> Callable[..., Tensor]: ...
    @property
    def rope(self) -> Callable[..., Tensor]: ...
