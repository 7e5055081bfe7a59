# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Modules whose matrices are parameters or, as some checkpoints hold them, quantised buffers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.float32_buffers import Float32Buffers
from ..ops.quant_linear import linear
from ..qtensor import FP8Tensor, MXFP4Tensor, QTensor

__all__ = ["Linear", "QuantisableWeights", "rows_of", "stacked"]

SCALE = "_scale_inv"


class QuantisableWeights(Float32Buffers):
    """A parameter that :meth:`quantise` replaces becomes two buffers: its codes and, ``_scale_inv`` behind its name,
    their scales. Activations are then rounded to FP8 before the product, as the models' own code does.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._blocks: dict[str, tuple[int, int] | None] = {}

    def quantise(self, name: str, weight: QTensor) -> None:
        assert isinstance(weight, FP8Tensor | MXFP4Tensor)
        delattr(self, name)
        self._blocks[name] = weight.block if isinstance(weight, FP8Tensor) else None
        self.register_buffer(name, weight.data if isinstance(weight, FP8Tensor) else weight.packed)
        self.register_buffer(name + SCALE, weight.scales)

    def matrix(self, name: str) -> Tensor | QTensor:
        weight: Tensor = getattr(self, name)
        if name not in self._blocks:
            return weight
        scales, block = getattr(self, name + SCALE), self._blocks[name]
        return MXFP4Tensor(weight, scales) if block is None else FP8Tensor(weight, scales, block)


class Linear(QuantisableWeights, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.matrix("weight")
        if isinstance(weight, Tensor):
            return F.linear(x, weight, self.bias)
        y = linear(x, weight, "fp8")
        return y if self.bias is None else y + self.bias


def rows_of(parts: Sequence[QTensor]) -> QTensor:
    """A copy of matrices of one format below one another: where blocks do not end with a matrix, they get shorter."""
    if isinstance(parts[0], MXFP4Tensor):
        fp4 = [part for part in parts if isinstance(part, MXFP4Tensor)]
        return MXFP4Tensor(_cat([part.packed for part in fp4]), _cat([part.scales for part in fp4]))
    fp8 = [part for part in parts if isinstance(part, FP8Tensor)]
    rows, columns = fp8[0].block
    if len(fp8) > 1:
        rows = math.gcd(rows, *(part.shape[-2] for part in fp8))
    scales = []
    for part in fp8:
        repeated = _bytes(part.scales).repeat_interleave(part.block[0] // rows, -2)
        scales.append(repeated[..., : -(-part.shape[-2] // rows), :].view(part.scales.dtype))
    return FP8Tensor(_cat([part.data for part in fp8]), _cat(scales), (rows, columns))


def stacked(matrices: Sequence[QTensor]) -> QTensor:
    """Matrices of one format and shape, one for each expert."""
    first = matrices[0]
    if isinstance(first, MXFP4Tensor):
        fp4 = [matrix for matrix in matrices if isinstance(matrix, MXFP4Tensor)]
        return MXFP4Tensor(torch.stack([m.packed for m in fp4]), _stack_bytes([m.scales for m in fp4]))
    fp8 = [matrix for matrix in matrices if isinstance(matrix, FP8Tensor)]
    return FP8Tensor(_stack_bytes([m.data for m in fp8]), _stack_bytes([m.scales for m in fp8]), fp8[0].block)


def _stack_bytes(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([_bytes(tensor) for tensor in tensors]).view(tensors[0].dtype)


def _bytes(tensor: Tensor) -> Tensor:
    """As integers of the same bits, on which torch has all of its operations."""
    return tensor.view(torch.uint8 if tensor.dtype.itemsize == 1 else torch.int32)


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([_bytes(tensor) for tensor in tensors], -2).view(tensors[0].dtype)
