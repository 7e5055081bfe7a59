# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The tests of CUDA draw on the CPU tests' cache layouts and truths."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "attention"))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New tensors and workspaces are full of NaN and of the largest integers, so that what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
