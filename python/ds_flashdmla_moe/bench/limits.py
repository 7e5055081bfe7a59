# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""What the machine can do, measured in the same run: the bandwidth of a copy and the rate of matrix products."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..cases import Work
from .timing import take_turns

__all__ = ["Limits"]

COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}  # read, and as much written; far more than caches hold
MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass
class Limits:
    """Rates are measured when they are first asked for, and kept."""

    device: torch.device
    seconds: float = 1.0
    _bandwidth: float = 0.0
    _matmul: dict[torch.dtype, float] = field(default_factory=dict)

    def bandwidth(self) -> float:
        """Bytes per second, read and written, of a large copy."""
        if not self._bandwidth:
            size = COPY_BYTES[self.device.type]
            source = torch.randint(256, (size,), dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            timing = take_turns({"copy": lambda: target.copy_(source)}, self.device, self.seconds)
            self._bandwidth = 2 * size / timing["copy"].device
        return self._bandwidth

    def matmul(self, dtype: torch.dtype) -> float:
        """Floating-point operations per second of torch's product of two large square matrices."""
        if dtype not in self._matmul:
            n = MATRIX_SIZE[self.device.type]
            # Random values: a GPU draws less power, and so runs faster, on equal ones.
            a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
            timing = take_turns({"matmul": lambda: a @ b}, self.device, self.seconds)
            self._matmul[dtype] = 2 * n**3 / timing["matmul"].device
        return self._matmul[dtype]

    def least_seconds(self, work: Work, dtype: torch.dtype) -> float:
        """The time below which the work cannot be done unless its data is in a cache already."""
        return max(work.bytes / self.bandwidth(), work.flops / self.matmul(dtype))

    def as_dict(self) -> dict[str, float]:
        """Everything measured so far, in GB/s and GFLOP/s."""
        rates = {f"matmul {str(dtype).removeprefix('torch.')} GFLOP/s": 1e-9 * r for dtype, r in self._matmul.items()}
        return {"copy GB/s": 1e-9 * self._bandwidth, **rates} if self._bandwidth else rates
