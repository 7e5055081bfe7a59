# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Modules whose own parameters have at least float32, whatever the dtype of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["WideParameters"]


class WideParameters(nn.Module):
    """``module.bfloat16()`` and the like move the module's own parameters, but leave their dtype; children follow."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def wide(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if result.dtype.itemsize < 4 else result

        if recurse:
            for child in self.children():
                child._apply(fn)  # type: ignore[no-untyped-call]
        return super()._apply(wide, False)  # type: ignore[no-untyped-call]
