# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Quantised tensors: codes with the scales of their blocks, checked when they are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FP8Tensor", "MXFP4Tensor", "NVFP4Tensor", "QTensor"]

# The values of the codes of E2M1: 1 sign, 2 exponent and 1 mantissa bits.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

_Self = TypeVar("_Self", bound="_Quantized")


@dataclass(frozen=True, eq=False)
class _Quantized:
    """What the formats share: every field that is a tensor lies on one device and moves with the others."""

    @property
    def device(self) -> torch.device:
        return self._tensors()[0].device

    def to(self: _Self, device: torch.device | str) -> _Self:
        """A copy on another device; tensors that are there already are shared."""
        moved = {name: value.to(device) for name, value in self._fields().items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **moved)

    def _fields(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def _tensors(self) -> list[Tensor]:
        return [value for value in self._fields().values() if isinstance(value, Tensor)]

    def _refuse(self, argument: str, expected: str, got: object) -> ValueError:
        return ValueError(f"{type(self).__name__}: {argument} must be {expected}, got {got}")

    def _take(self, argument: str, *dtypes: torch.dtype, view: Sequence[torch.dtype] = ()) -> Tensor:
        """The field, of one of the dtypes; those in ``view`` hold the same bits and are viewed as the first."""
        value = getattr(self, argument)
        if not isinstance(value, Tensor) or value.dtype not in (*dtypes, *view):
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in (*dtypes, *view))
            got = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else type(value).__name__
            raise self._refuse(argument, f"a tensor of {names}", got)
        if value.dtype in view:
            value = value.view(dtypes[0])
            object.__setattr__(self, argument, value)
        return value

    def _check_shape(self, argument: str, text: str, shape: Sequence[int]) -> None:
        got = getattr(self, argument).shape
        if got != torch.Size(shape):
            raise self._refuse(argument, f"{text} = {list(shape)}", list(got))

    def _check_devices(self) -> None:
        devices = [str(value.device) for value in self._tensors()]
        if len(set(devices)) > 1:
            raise ValueError(f"{type(self).__name__}: all tensors must be on one device, got {', '.join(devices)}")


@dataclass(frozen=True, eq=False)
class _FP4(_Quantized):
    """Packed E2M1 codes, and one scale for each group of a row."""

    packed: Tensor
    scales: Tensor
    _group: ClassVar[int]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.packed.shape[:-1], self.packed.shape[-1] * 2))

    def _check(self, scales: torch.dtype) -> None:
        group = self._group
        packed = self._take("packed", torch.uint8, view=(torch.int8, torch.float4_e2m1fn_x2))
        self._take("scales", scales, view=(torch.uint8,))
        if packed.dim() == 0 or packed.shape[-1] * 2 % group:
            raise self._refuse("packed", f"[..., K / 2] with K a multiple of {group}", list(packed.shape))
        self._check_shape("scales", f"[..., K / {group}]", (*packed.shape[:-1], packed.shape[-1] * 2 // group))
        self._check_devices()

    def _groups(self, wide: torch.dtype) -> Tensor:
        """``code * scale`` as ``[..., K / group, group]``; exact."""
        codes = torch.tensor(_E2M1, dtype=wide, device=self.device)
        pairs = torch.stack((codes.repeat(16), codes.repeat_interleave(16)), -1)  # the values of each byte
        values = F.embedding(self.packed.int(), pairs).view(*self.scales.shape, self._group)
        return values.mul_(self.scales.to(wide).unsqueeze(-1))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _repeated(scales: Tensor, block: int, dim: int, size: int) -> Tensor:
    """The scale of each of ``size`` elements."""
    return scales.repeat_interleave(min(block, size), dim).narrow(dim, 0, size)


@dataclass(frozen=True, eq=False)
class NVFP4Tensor(_FP4):
    """NVFP4: E2M1 codes, an E4M3 scale for 16 neighbours of a row, and a factor: ``code * scale * global_scale``.

    Attributes:
        packed: uint8 ``[..., N, K / 2]``, the low nibble is the element of even k; int8 is viewed as uint8.
        scales: float8_e4m3fn ``[..., N, K / 16]``; uint8 is viewed.
        global_scale: float32, a factor (checkpoints of compressed-tensors hold its reciprocal, see
            :meth:`from_compressed_tensors`): a scalar, one per leading index (per expert) ``[...]``, or one per row
            ``[..., N]``, as a gate and an up projection have when they were quantised apart and are run as one.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """

    global_scale: Tensor
    _group = 16

    def __post_init__(self) -> None:
        factor = self._take("global_scale", torch.float32)
        self._check(torch.float8_e4m3fn)
        rows = self.packed.shape[:-1]
        if factor.shape not in (torch.Size(), rows[:-1], rows):
            if factor.shape != (1,):
                expected = f"a scalar, [...] = {list(rows[:-1])} or [..., N] = {list(rows)}"
                raise self._refuse("global_scale", expected, list(factor.shape))
            object.__setattr__(self, "global_scale", factor.squeeze(0))

    @classmethod
    def from_compressed_tensors(cls, packed: Tensor, scales: Tensor, weight_global_scale: Tensor) -> NVFP4Tensor:
        """From a checkpoint of compressed-tensors, whose global scale is the one to divide by.

        The result's ``global_scale`` is its reciprocal, rounded to nearest.
        """
        if not isinstance(weight_global_scale, Tensor) or weight_global_scale.dtype != torch.float32:
            raise ValueError("NVFP4Tensor: weight_global_scale must be a tensor of float32")
        return cls(packed, scales, weight_global_scale.double().reciprocal().float())

    @classmethod
    def cat(cls, parts: Sequence[NVFP4Tensor]) -> NVFP4Tensor:
        """The rows of all parts as one tensor, exactly: parts whose global scales differ give one per row."""
        if not parts:
            raise ValueError("NVFP4Tensor: parts must hold at least one tensor")
        packed = torch.cat([part.packed for part in parts], -2)
        scales = torch.cat([part.scales.view(torch.uint8) for part in parts], -2)
        first = parts[0].global_scale
        if first.shape != parts[0].packed.shape[:-1] and all(torch.equal(first, p.global_scale) for p in parts[1:]):
            return cls(packed, scales, first)
        return cls(packed, scales, torch.cat([part.row_scales for part in parts], -1))

    @property
    def row_scales(self) -> Tensor:
        """The global scale of every row, ``[..., N]`` float32: an expanded view."""
        rows, factor = self.packed.shape[:-1], self.global_scale
        return factor.unsqueeze(-1).expand(rows) if 0 < factor.dim() < len(rows) else factor.expand(rows)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``(code * scale) * global_scale``: the first product is exact, the second rounded to float32 (exact in
        float64 for float64), then to ``dtype``."""
        wide = _wide(dtype)
        return self._groups(wide).mul_(self.row_scales[..., None, None].to(wide)).flatten(-2).to(dtype)


@dataclass(frozen=True, eq=False)
class MXFP4Tensor(_FP4):
    """MXFP4 (OCP): E2M1 codes and a power of two for 32 neighbours of a row: ``code * scale``.

    Attributes:
        packed: uint8 ``[..., N, K / 2]``, the low nibble is the element of even k; int8 is viewed as uint8.
        scales: float8_e8m0fnu ``[..., N, K / 32]``; uint8 is viewed.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """

    _group = 32

    def __post_init__(self) -> None:
        self._check(torch.float8_e8m0fnu)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``code * scale``: exact in float32, then rounded to ``dtype``."""
        return self._groups(_wide(dtype)).flatten(-2).to(dtype)


@dataclass(frozen=True, eq=False)
class FP8Tensor(_Quantized):
    """FP8 E4M3 with one scale for each block of a matrix, the last blocks may be partial: ``code * scale``.

    Attributes:
        data: float8_e4m3fn ``[..., N, K]``; uint8 is viewed.
        scales: ``[..., ceil(N / block[0]), ceil(K / block[1])]`` float8_e8m0fnu or float32; uint8 is viewed as
            float8_e8m0fnu.
        block: rows and columns that share a scale: (1, 128) for activations, (128, 128) for weights.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """

    data: Tensor
    scales: Tensor
    block: tuple[int, int] = (1, 128)

    def __post_init__(self) -> None:
        data = self._take("data", torch.float8_e4m3fn, view=(torch.uint8,))
        self._take("scales", torch.float8_e8m0fnu, torch.float32, view=(torch.uint8,))
        if len(self.block) != 2 or min(self.block) < 1:
            raise self._refuse("block", "two numbers of at least 1", self.block)
        object.__setattr__(self, "block", tuple(self.block))
        rows, columns = self.block
        if data.dim() < (1 if rows == 1 else 2):
            raise self._refuse("data", "[..., N, K]", list(data.shape))
        if rows == 1:
            blocks = (*data.shape[:-1], -(-data.shape[-1] // columns))
        else:
            blocks = (*data.shape[:-2], -(-data.shape[-2] // rows), -(-data.shape[-1] // columns))
        self._check_shape("scales", f"[..., ceil(N / {rows}), ceil(K / {columns})]", blocks)
        self._check_devices()

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``code * scale`` rounded to float32 (exact for powers of two, and in float64), then to ``dtype``."""
        wide, (rows, columns) = _wide(dtype), self.block
        scales = _repeated(self.scales.to(wide), columns, -1, self.shape[-1])
        if rows > 1:
            scales = _repeated(scales, rows, -2, self.shape[-2])
        return self.data.to(wide).mul_(scales).to(dtype)


QTensor = NVFP4Tensor | MXFP4Tensor | FP8Tensor
