# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""What this installation is and runs on: versions, processor, GPUs, and the implementations that are active."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import _library

__all__ = ["active_implementations", "describe"]

OTHERS = ("flash_attn", "flash_mla", "deep_gemm", "triton", "numpy", "safetensors")  # named when installed


def describe() -> dict[str, Any]:
    """Plain data, ready for JSON."""
    return {
        "versions": {
            "ds-flashdmla-moe": _library.VERSION,
            "torch": torch.__version__,
            "Python": platform.python_version(),
            **{name: version for name in OTHERS if (version := _version(name))},
        },
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": {
            "model": _cpu_model(),
            "threads": torch.get_num_threads(),
            "instruction set": torch.ops.dsm.cpu_instruction_set(),
        },
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "library": str(_library.PATH),
        "cuda architectures": [name for name in torch.ops.dsm.cuda_architectures().split(";") if name],
        "operators": active_implementations(),
    }


def active_implementations() -> dict[str, dict[str, str]]:
    """For every operator its best own implementation on each kind of device of this machine, "none" where it has none.

    A request can still be refused by that implementation and taken by the next: see ``dsm explain``.
    """
    capability = max((torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())), default=(0, 0))

    def first(entry: dict[str, Any], usable: set[str]) -> str:
        names = (row["name"] for row in entry["implementations"] if row["built"] and row["name"] in usable)
        return next(names, "none")

    on_gpu = {"cuda"} | ({"sm90"} if capability[0] == 9 else set())
    return {
        entry["name"]: {"cpu": first(entry, {"cpu"})} | ({"cuda": first(entry, on_gpu)} if capability[0] else {})
        for entry in _library.operators()
    }


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
