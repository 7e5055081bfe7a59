# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Weights of a model folder: safetensors files, mapped and read tensor by tensor. Their contents are untrusted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..qtensor import FP8Tensor, MXFP4Tensor
from .config import Fp8Blocks, read_json

__all__ = ["Checkpoint", "StoredTensor"]

INDEX = "model.safetensors.index.json"
FLOATS = ("F32", "BF16", "F16")
FP4_PAIRS = ("I8", "U8", "F4")  # two codes in a byte
SCALE = "_scale_inv"  # of tensor x.weight in x.weight_scale_inv


class StoredTensor(NamedTuple):
    """What a file's header says of a tensor; ``dtype`` is safetensors' name."""

    shape: tuple[int, ...]
    dtype: str
    file: str
    name: str


class Checkpoint:
    """The tensors of a folder by name: of its one safetensors file, or of all that its index names.

    Headers are read and checked here: a file that is cut off or too long, overlapping or out-of-file offsets, an index
    that names other files than plain ones of the folder, or other tensors than the files hold, raise ValueError.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, StoredTensor] = {}
        self._files: dict[str, Any] = {}
        weight_map = _weight_map(folder)
        for file in sorted({*weight_map.values()}) if weight_map is not None else [_only_file(folder)]:
            self._open(file)
        if weight_map is not None:
            found = {name: stored.file for name, stored in self.tensors.items()}
            wrong = sorted(name for name in {*weight_map, *found} if weight_map.get(name) != found.get(name))
            if wrong:
                raise ValueError(f"{folder / INDEX}: index and files disagree about {some(wrong)}")

    def _open(self, name: str) -> None:
        path = self.folder / name
        try:
            if not path.is_file():  # which a pipe or a device is not
                raise OSError("there is no such file")
            file: Any = safe_open(path, framework="pt")
            self._files[name] = file
            for tensor in file.keys():  # noqa: SIM118 (not a mapping)
                if tensor in self.tensors:
                    raise ValueError(f"{path}: tensor {tensor!r} is also in {self.tensors[tensor].file}")
                header = file.get_slice(tensor)
                self.tensors[tensor] = StoredTensor(tuple(header.get_shape()), str(header.get_dtype()), name, tensor)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}") from error

    def rename(self, new_name: Callable[[str], str]) -> None:
        """Know tensors by other names; ValueError if two get the same one."""
        renamed: dict[str, StoredTensor] = {}
        for name, stored in self.tensors.items():
            known = renamed.setdefault(new_name(name), stored)
            if known is not stored:
                raise ValueError(f"{self.folder}: {name} and {known.name} are the same tensor of the model")
        self.tensors = renamed

    def check(
        self,
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]],
        is_unused: Callable[[str], bool],
        quantization: Fp8Blocks | None,
    ) -> None:
        """That the expected tensors are there in their shapes, with their scales, and no others but unused ones."""
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            raise ValueError(f"{self.folder}: missing {some(missing)}")
        scales = set()
        for name, (dtype, shape) in expected.items():
            stored = self.tensors[name]
            kinds: tuple[str, ...] = FLOATS if dtype.is_floating_point else ("I64", "I32")
            if quantization is not None and len(shape) == 2 and stored.dtype in ("F8_E4M3", *FP4_PAIRS):
                scales.add(name + SCALE)
                fp4 = stored.dtype in FP4_PAIRS
                kinds = (stored.dtype,)
                if fp4 and stored.dtype != "F4":
                    shape = shape[0], shape[1] // 2
                self._check_scale(name, expected[name][1], (1, 32) if fp4 else quantization.block, fp4)
            if stored.shape != shape:
                raise ValueError(f"{self.folder}: {name} must have shape {list(shape)}, got {list(stored.shape)}")
            if stored.dtype not in kinds:
                raise ValueError(f"{self.folder}: {name} must be {' or '.join(kinds)}, got {stored.dtype}")
        extra = [name for name in self.tensors if not (name in expected or name in scales or is_unused(name))]
        if extra:
            raise ValueError(f"{self.folder}: not of this model: {some(extra)}")

    def _check_scale(self, name: str, shape: tuple[int, ...], block: tuple[int, int], fp4: bool) -> None:
        scale = self.tensors.get(name + SCALE)
        if scale is None:
            raise ValueError(f"{self.folder}: missing tensor {name + SCALE}, the scales of {name}")
        if fp4 and shape[1] % block[1]:
            raise ValueError(f"{self.folder}: {name} must have a multiple of {block[1]} columns, got {shape[1]}")
        want = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
        kinds = ("F8_E8M0", "U8") if fp4 else ("F8_E8M0", *FLOATS)
        if scale.shape != want or scale.dtype not in kinds:
            got = f"{list(scale.shape)} {scale.dtype}"
            raise ValueError(f"{self.folder}: {name + SCALE} must be {list(want)} {' or '.join(kinds)}, got {got}")

    def read(self, name: str, quantization: Fp8Blocks | None = None) -> Tensor:
        """A tensor that ``check`` has passed, read when it is used; a quantised one is float32 ``code * scale``."""
        if quantization is None or not self.is_quantised(name):
            return self._mapped(name)
        return self.read_codes(name, quantization).dequantize()

    def is_quantised(self, name: str) -> bool:
        return name + SCALE in self.tensors

    def read_codes(self, name: str, quantization: Fp8Blocks | None) -> FP8Tensor | MXFP4Tensor:
        """A quantised tensor that ``check`` has passed."""
        assert quantization is not None
        tensor, scale = self._mapped(name), self._mapped(name + SCALE)
        if self.tensors[name].dtype in FP4_PAIRS:
            return MXFP4Tensor(tensor, scale)
        scale = scale if scale.dtype == torch.float8_e8m0fnu else scale.float()
        return FP8Tensor(tensor, scale, quantization.block)

    def _mapped(self, name: str) -> Tensor:
        stored = self.tensors[name]
        try:
            tensor: Tensor = self._files[stored.file].get_tensor(stored.name)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{self.folder / stored.file}: cannot read {name}: {error}") from error
        return tensor


def some(names: Iterable[str]) -> str:
    """The first of some names, and how many there are."""
    listed = list(names)
    shown = ", ".join(name if len(name) < 120 else name[:117] + "…" for name in listed[:3])
    noun = "tensor" if len(listed) == 1 else "tensors"
    return f"{noun} {shown}" + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _weight_map(folder: Path) -> dict[str, str] | None:
    """Which file has which tensor according to the index; None without one."""
    path = folder / INDEX
    if not path.exists():
        return None
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: weight_map must be an object that names tensors and their files")
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file.endswith(".safetensors") and not {"/", "\\", "\0"} & set(file)
        if not plain:
            raise ValueError(
                f"{path}: the file of {some([name])} must be a name in this folder, got {str(file)[:80]!r}"
            )
    return weight_map


def _only_file(folder: Path) -> str:
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(f"{folder} must hold {INDEX} or exactly one safetensors file, got {len(files)} of these")
    return files[0]
