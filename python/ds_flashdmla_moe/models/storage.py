# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""How checkpoints store a quantised matrix ``x.weight``: which tensors of which dtypes and shapes.

======================  ==================  =====================  =========================  ==============
format                  codes               scales                 factor                     not used
======================  ==================  =====================  =========================  ==============
DeepSeek FP8            weight              weight_scale_inv
DeepSeek MXFP4          weight              weight_scale_inv
MXFP4                   weight, or _packed  weight_scale                                      input_scale
ModelOpt NVFP4          weight              weight_scale           weight_scale_2             input_scale
compressed-tensors      weight_packed       weight_scale           weight_global_scale        input_global_scale
======================  ==================  =====================  =========================  ==============
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..qtensor import FP8Tensor, MXFP4Tensor, NVFP4Tensor, QTensor

__all__ = ["Storage", "owner", "storage_of"]

Kinds = tuple[str, ...]  # safetensors' names of dtypes
Layout = dict[str, tuple[Kinds, tuple[int, ...]]]
FLOATS: Kinds = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class Storage:
    """``tensors``: the names, in the order codes, scales, factor, with their dtypes and shapes; ``unused``: others."""

    format: Literal["fp8", "mxfp4", "modelopt", "compressed-tensors"]
    tensors: Layout
    unused: tuple[str, ...] = ()
    block: tuple[int, int] = (1, 1)

    def assemble(self, parts: list[Tensor]) -> QTensor:
        """The matrix from its tensors."""
        if self.format == "fp8":
            codes, scales = parts
            return FP8Tensor(codes, scales if scales.dtype == torch.float8_e8m0fnu else scales.float(), self.block)
        if self.format == "mxfp4":
            return MXFP4Tensor(*parts)
        if self.format == "modelopt":
            return NVFP4Tensor(*parts)
        return NVFP4Tensor.from_compressed_tensors(*parts)


def storage_of(
    name: str, shape: tuple[int, ...], dtypes: dict[str, str], block: tuple[int, int] | None
) -> Storage | None:
    """How a matrix is stored where there are tensors of these dtypes; None: as numbers, or not at all.

    ``block`` is that of FP8; without one there is none. Not all tensors of the format need to be there.
    """
    packed, dtype = f"{name}_packed" in dtypes, dtypes.get(name)
    if len(shape) != 2 or not (packed or dtype in ("F8_E4M3", "F4", "I8", "U8")):
        return None
    rows, columns = shape
    layout: Layout
    if dtype == "F8_E4M3":
        if block is None:
            return None
        blocks = (-(-rows // block[0]), -(-columns // block[1]))
        layout = {name: (("F8_E4M3",), shape), f"{name}_scale_inv": (("F8_E8M0", *FLOATS), blocks)}
        return Storage("fp8", layout, block=block)
    in_pairs: Kinds = ("F4",) if dtype == "F4" else ("I8", "U8")
    codes = {f"{name}_packed" if packed else name: (in_pairs, (rows, columns if dtype == "F4" else columns // 2))}
    stem, scale, factor = (
        name.removesuffix("weight"),
        f"{name}_scale",
        name + ("_global_scale" if packed else "_scale_2"),
    )
    unused = f"{stem}input_global_scale" if packed else f"{stem}input_scale"
    if factor in dtypes or dtypes.get(scale) == "F8_E4M3":
        _check_columns(name, columns, 16)
        layout = {**codes, scale: (("F8_E4M3",), (rows, columns // 16)), factor: (("F32",), (1,) if packed else ())}
        return Storage("compressed-tensors" if packed else "modelopt", layout, (unused,))
    if not packed and scale not in dtypes and block is not None:
        scale = f"{name}_scale_inv"
    _check_columns(name, columns, 32)
    return Storage("mxfp4", {**codes, scale: (("F8_E8M0", "U8"), (rows, columns // 32))}, (unused,))


_COMPANION = re.compile(r"weight_(?:scale|scale_inv|scale_2|packed|global_scale)|input_(?:scale|global_scale)")


def owner(tensor: str) -> str:
    """The matrix that a stored tensor belongs to: x.weight for x.weight_scale; itself for others."""
    stem, _, last = tensor.rpartition(".")
    return f"{stem}.weight" if _COMPANION.fullmatch(last) else tensor


def _check_columns(name: str, columns: int, group: int) -> None:
    if columns % group:
        raise ValueError(f"{name} must have a multiple of {group} columns to be stored in FP4, got {columns}")
