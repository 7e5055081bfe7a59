# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Modules whose buffers are float32 whatever the dtype of their parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["Float32Buffers"]


class Float32Buffers(nn.Module):
    """``module.bfloat16()`` and the like move buffers, but leave their dtype: angles and selection biases need it."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():
            original = before[name]
            if buffer is not None and original is not None and buffer.dtype != original.dtype:
                self._buffers[name] = original.to(buffer.device)
        return self
