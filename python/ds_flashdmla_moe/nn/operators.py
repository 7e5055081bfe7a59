# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The operators a model is made of, as one replaceable set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable


__all__ = ["OperatorSet", "library"]


class OperatorSet(Protocol):
    """What a module calls. The modules ``ds_flashdmla_moe.ops`` and ``ds_flashdmla_moe.reference`` are such sets."""

    @property
    def flash_dmla_fwd(self) -> Callable[..., Any]: ...
    @property
    def moe_forward_unfused(self) -> Callable[..., Tensor]: ...
    @property
    def moe_megakernel_fwd(self) -> Callable[..., Tensor]: ...
    @property
    def moe_gate(self) -> Callable[..., tuple[Tensor, Tensor, Tensor]]: ...
    @property
    def rms_norm(self) -> Callable[..., Tensor]: ...
    @property
    def rope(self) -> Callable[..., Tensor]: ...


def library() -> OperatorSet:
    """The library's own operators."""
    from .. import ops

    return ops
