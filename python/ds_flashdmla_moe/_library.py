# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Loads libdsm_torch, which registers every operator under ``torch.ops.dsm``."""

from __future__ import annotations

import json
import os
import sysconfig
from pathlib import Path
from typing import Any

import torch

_NAME = "libdsm_torch.so"


def _candidates() -> list[Path]:
    folders = [Path(__file__).parent / "lib"]
    # An editable install keeps the sources in the checkout and the built libraries in site-packages.
    folders += [Path(sysconfig.get_path(key)) / __package__ / "lib" for key in ("platlib", "purelib")]
    if override := os.environ.get("DSM_LIBRARY_DIR"):
        folders.insert(0, Path(override))
    return [folder / _NAME for folder in folders]


def _load() -> Path:
    candidates = _candidates()
    for path in candidates:
        if path.is_file():
            torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
            return path
    places = ", ".join(str(path.parent) for path in candidates)
    raise ImportError(
        f"{_NAME} was not found in {places}; run 'make build' or 'pip install .' in the checkout, "
        "or set DSM_LIBRARY_DIR to the folder that holds it"
    )


PATH = _load()
VERSION: str = torch.ops.dsm.version()


def operators() -> list[dict[str, Any]]:
    """Every operator: ``{"family", "name", "implementations": [{"name", "built"}]}``, best implementation first."""
    result: list[dict[str, Any]] = json.loads(torch.ops.dsm.operators())
    return result
