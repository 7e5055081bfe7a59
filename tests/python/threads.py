# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Results must not depend on the number of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def assert_same_bits(run: Callable[[], Sequence[Tensor]], threads: Sequence[int] = (1, 2, 5)) -> None:
    """Runs with each number of threads and fails unless all results are the same bits."""
    before = torch.get_num_threads()
    results = []
    try:
        for count in threads:
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for index, (first, again) in enumerate(zip(results[0], other, strict=True)):
            assert torch.equal(first, again), f"result {index} depends on the number of threads"
