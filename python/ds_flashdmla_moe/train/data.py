# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Text for training: which files, which of them are for validation, which bytes a step sees."""

from __future__ import annotations

import hashlib
import sysconfig
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..config import MAX_BYTES

__all__ = ["Corpus", "load_corpus", "training_batch"]

# Tests and data tables are no prose; the rest is what some distributions of Python leave out.
STDLIB_SKIPPED = {
    *("__pycache__", "test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"),
    *("distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo"),
}


@dataclass(frozen=True)
class Corpus:
    """The bytes of the training and the validation split, uint8 [bytes]."""

    train: Tensor
    validation: Tensor
    files: int
    source: str

    @property
    def fingerprint(self) -> str:
        """Identifies the text and its split: two runs with one fingerprint see the same bytes."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation):
            digest.update(hashlib.sha256(part.numpy().data).digest())
        return digest.hexdigest()

    def evaluation_span(self, context: int, max_bytes: int) -> Tensor:
        """The first validation bytes, int64 [windows * context + 1], on which every model is judged."""
        available = self.validation.numel() - 1
        windows = max(1, min(available, max_bytes) // context)
        return self.validation[: min(windows * context, available) + 1].long()


def _stdlib_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [(path.relative_to(root).as_posix(), path) for path in root.rglob("*.py")]
    return [(name, path) for name, path in files if not STDLIB_SKIPPED.intersection(name.split("/"))]


def _files_under(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    found = []
    for path in paths:
        if path.is_dir():
            inside = ((p.relative_to(path), p) for p in path.rglob("*") if p.is_file())
            found += [(name.as_posix(), p) for name, p in inside if not any(s.startswith(".") for s in name.parts)]
        elif path.exists():
            found.append((path.name, path))
        else:
            raise FileNotFoundError(f"no such file or folder: {path}")
    return found


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def load_corpus(paths: Sequence[Path] = (), max_bytes: int = MAX_BYTES) -> Corpus:
    """Read the files and folders ``paths`` (default: the Python standard library's sources) as bytes.

    Files are taken in the fixed order of a hash of their relative name, up to ``max_bytes`` in all; about one in
    ten is for validation, again by that hash, so that neither the order of a folder nor another file changes the
    side a file is on. Where this leaves a side empty (a single file), the last tenth of each file is for validation.
    Hidden and binary files (a NUL byte) in folders are skipped. Raises ValueError when there is too little text.
    """
    named = _files_under(paths) if paths else _stdlib_files()
    source = ", ".join(map(str, paths)) if paths else "the Python standard library's sources"
    taken: list[tuple[int, bytes]] = []
    total = 0
    for key, _, path in sorted((zlib.crc32(name.encode()), name, path) for name, path in named):
        text = path.read_bytes()
        if not text or b"\0" in text:
            continue
        if total + len(text) > max_bytes:
            if taken:
                continue  # a smaller one may still fit
            text = text[:max_bytes]
        taken.append((key, text))
        total += len(text)
    train = b"".join(text for key, text in taken if key % 10)
    validation = b"".join(text for key, text in taken if key % 10 == 0)
    if not train or not validation:
        train = b"".join(text[: len(text) - len(text) // 10] for _, text in taken)
        validation = b"".join(text[len(text) - len(text) // 10 :] for _, text in taken)
    if not train or len(validation) < 2:
        raise ValueError(f"too little text in {source}: {total} bytes in {len(taken)} text files")
    return Corpus(_tensor(train), _tensor(validation), len(taken), source)


def training_batch(text: Tensor, batch: int, context: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [batch, context] of one step: random windows that depend on (seed, step) alone."""
    mixed = zlib.crc32(f"{seed}/{step}".encode())  # torch's CPU generator uses 32 bits of its seed
    generator = torch.Generator().manual_seed(mixed)
    if text.numel() <= context:
        raise ValueError(f"the training text must be longer than context = {context} bytes, got {text.numel()}")
    starts = torch.randint(text.numel() - context, (batch, 1), generator=generator)
    windows = text[starts + torch.arange(context + 1)].long()
    return windows[:, :-1], windows[:, 1:]
