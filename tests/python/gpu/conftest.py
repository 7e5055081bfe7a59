# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The tests of CUDA draw on the CPU tests' cache layouts and truths."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "attention"))

if "PYTEST_XDIST_WORKER" in os.environ:
    # A thread per processor in every worker: they wait for one another, and 0.1 s of the CPU's work becomes 20 s.
    torch.set_num_threads(1)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """New tensors and workspaces are full of NaN and of the largest integers, so that what is not written shows."""
    torch.set_deterministic_debug_mode("warn")  # torch.use_deterministic_algorithms imports the compiler, for seconds
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode("default")
