# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""How checkpoints store a quantised matrix ``x.weight``: which tensors of which dtypes and shapes.

======================  ==================  =====================  =========================  ==============
format                  codes               scales                 factor                     not used
======================  ==================  =====================  =========================  ==============
DeepSeek FP8            weight              weight_scale_inv
DeepSeek MXFP4          weight              weight_scale_inv
ModelOpt NVFP4          weight              weight_scale           weight_scale_2             input_scale
compressed-tensors      weight_packed       weight_scale           weight_global_scale        input_global_scale
======================  ==================  =====================  =========================  ==============
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..qtensor import FP8Tensor, MXFP4Tensor, NVFP4Tensor, QTensor

__all__ = ["Storage", "storage_of"]

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
    if packed or f"{name}_scale" in dtypes:
        _check_columns(name, columns, 16)
        stem = name.removesuffix("weight")
        layout = {
            f"{name}_packed" if packed else name: (("U8",), (rows, columns // 2)),
            f"{name}_scale": (("F8_E4M3",), (rows, columns // 16)),
        }
        if packed:
            layout[f"{name}_global_scale"] = (("F32",), (1,))
            return Storage("compressed-tensors", layout, (f"{stem}input_global_scale",))
        layout[f"{name}_scale_2"] = (("F32",), ())
        return Storage("modelopt", layout, (f"{stem}input_scale",))
    if dtype == "F8_E4M3":
        if block is None:
            return None
        blocks = (-(-rows // block[0]), -(-columns // block[1]))
        layout = {name: (("F8_E4M3",), shape), f"{name}_scale_inv": (("F8_E8M0", *FLOATS), blocks)}
        return Storage("fp8", layout, block=block)
    _check_columns(name, columns, 32)
    layout = {
        name: (("F4",), shape) if dtype == "F4" else (("I8", "U8"), (rows, columns // 2)),
        f"{name}_scale_inv": (("F8_E8M0", "U8"), (rows, columns // 32)),
    }
    return Storage("mxfp4", layout)


def _check_columns(name: str, columns: int, group: int) -> None:
    if columns % group:
        raise ValueError(f"{name} must have a multiple of {group} columns to be stored in FP4, got {columns}")
