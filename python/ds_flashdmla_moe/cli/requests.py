# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""What the examining commands are asked: devices, dtypes and sizes, as words of the command line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..cases import Case

__all__ = ["device_named", "dtype_named", "sized"]


def device_named(name: str | None) -> torch.device:
    """None: the GPU where there is one, else the CPU."""
    import torch

    gpu = torch.cuda.is_available()
    if name is None:
        name = "cuda" if gpu else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if kind == "cpu":
        return torch.device("cpu")
    if not gpu:
        raise ValueError("--device cuda: torch sees no GPU here")
    number = int(index) if index else torch.cuda.current_device()
    if number >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    return torch.device("cuda", number)


def dtype_named(name: str) -> torch.dtype:
    from ..accuracy import FLOATING

    known = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATING}
    if name not in known:
        raise ValueError(f"--dtype must be one of {', '.join(known)}, got {name!r}")
    return known[name]


def sized(cases: Iterable[Case], sizes: Iterable[str]) -> list[tuple[Case, dict[str, int]]]:
    """Every case with the sizes NAME=NUMBER that it knows in place of its own; each must be known to some case."""
    wanted: dict[str, int] = {}
    for text in sizes:
        name, _, number = text.partition("=")
        if not number.isdigit() or int(number) == 0:
            raise ValueError(f"--size must be NAME=NUMBER with a positive whole number, got {text!r}")
        wanted[name] = int(number)
    cases = list(cases)
    known = {name: None for case in cases for name in case.sizes}
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"--size {unknown[0]} is not a dimension here; there are {', '.join(known)}")
    return [(case, {name: wanted.get(name, value) for name, value in case.sizes.items()}) for case in cases]
