# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Damaged model folders load or raise ValueError; DSM_FUZZ=N tries N of them (default 350)."""

from __future__ import annotations

import os
from pathlib import Path

from fuzz_folders import run


def test_damaged_folders(tmp_path: Path) -> None:
    count = int(os.environ.get("DSM_FUZZ", "350"))
    loaded = run(range(count), tmp_path)
    assert 0 < loaded < count
