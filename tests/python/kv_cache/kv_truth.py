# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The caches' formats from their description: codes by search among a format's numbers, bytes by offsets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Numbers of the codes from 0 up: E4M3 has 3 bits after the point and exponents from -6, E2M1 1 bit and from 0.
E4M3 = [m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:-1]
E2M1 = [m / 2 if e == 0 else (1 + m / 2) * 2.0 ** (e - 1) for e in range(4) for m in range(2)]

V32_FP8, V32_NVFP4, V4_FP8, V41_FP8, V41_FP4 = 656, 352, 584, 528, 288
V32_FORMATS = (V32_FP8, V32_NVFP4)
V4_FORMATS = (V4_FP8, V41_FP8, V41_FP4)
NAMES = {656: "v32_fp8", 352: "v32_nvfp4", 584: "v4_fp8", 528: "v41_fp8", 288: "v41_fp4"}


def width_of(size: int) -> int:
    return 576 if size in V32_FORMATS else 512


def nearest(x: Tensor, table: list[float]) -> Tensor:
    """The code of the number nearest to each x, the even one of two, with the sign in the bit above; saturating."""
    numbers = torch.tensor(table, dtype=torch.float64)
    middles = torch.cat(((numbers[1:] + numbers[:-1]) / 2, torch.tensor([torch.inf])))
    size = x.double().abs()
    code = torch.searchsorted(middles[:-1], size)
    code = code + (middles[code] == size) * (code % 2)
    return code + x.signbit() * (128 if table is E4M3 else 8)


def power_of_two(amax: Tensor) -> Tensor:
    """Exponents: the smallest k with 2^k >= max(amax, 1e-4) times the float32 nearest to 1/448."""
    least = (amax.float().clamp_min(1e-4) * torch.tensor(0x3B124925, dtype=torch.int32).view(torch.float32)).double()
    k = torch.arange(-40, 128, dtype=torch.float64)
    return torch.searchsorted(torch.exp2(k), least) - 40


def little_endian(x: Tensor) -> Tensor:
    """[..., n] numbers -> [..., n * bytes] uint8."""
    return x.contiguous().view(torch.uint8)


def quantized(x: Tensor, group: int, table: list[float], rule: str) -> tuple[Tensor, Tensor]:
    """Codes, packed in pairs for E2M1, and the bytes of the scales."""
    groups = x.float().unflatten(-1, (-1, group))
    amax = groups.abs().amax(-1)
    if rule in ("nvfp4", "v41_fp4"):
        sixth = (amax / 6).double()
        of_zeros = 1.0 if rule == "nvfp4" else 2.0**-9
        codes = nearest(torch.where(sixth == 0, of_zeros, sixth.clamp_min(2.0**-9)), E4M3)
        scale, scale_bytes = torch.tensor(E4M3, dtype=torch.float32)[codes], codes.to(torch.uint8)
    elif rule == "fp32":
        scale = (amax / 448).clamp_min(2.0**-126)
        scale_bytes = little_endian(scale)
    else:
        exponent = power_of_two(amax)
        scale = torch.exp2(exponent.double()).float()
        scale_bytes = (exponent + 127).to(torch.uint8) if rule == "e8m0" else little_endian(scale)
    elements = nearest((groups / scale[..., None]).flatten(-2), table)
    if table is E2M1:
        elements = elements[..., 0::2] + 16 * elements[..., 1::2]
    return elements.to(torch.uint8), scale_bytes


def records(rows: Tensor, size: int, scale_format: str = "ue8m0") -> Tensor:
    """[rows, size] bytes of rows of finite values; V4's scales stand behind the data."""
    if size == V32_FP8:
        elements, scales = quantized(rows[:, :512], 128, E4M3, scale_format)
        return torch.cat((elements, scales, little_endian(rows[:, 512:].float().bfloat16())), -1)
    if size == V32_NVFP4:
        elements, scales = quantized(rows[:, :512], 16, E2M1, "nvfp4")
        return torch.cat((elements, nearest(rows[:, 512:].float(), E4M3).to(torch.uint8), scales), -1)
    if size == V4_FP8:
        elements, scales = quantized(rows[:, :448], 64, E4M3, "e8m0")
        zero = torch.zeros(len(rows), 1, dtype=torch.uint8)
        return torch.cat((elements, little_endian(rows[:, 448:].float().bfloat16()), scales, zero), -1)
    if size == V41_FP8:
        return torch.cat(quantized(rows, 32, E4M3, "e8m0"), -1)
    return torch.cat(quantized(rows, 16, E2M1, "v41_fp4"), -1)


@dataclass
class Pages:
    """A cache of 0xFF bytes, which are NaN in every format, with some padding behind each page.

    ``tail`` bytes of each entry stand behind the others' data at the page's end.
    """

    size: int
    pages: int
    page_size: int
    padding: int = 0
    tail: int | None = None

    def __post_init__(self) -> None:
        if self.tail is None:
            self.tail = 8 if self.size == V4_FP8 else 0
        self.stride = self.page_size * self.size + self.padding
        self.buffer = torch.full((self.pages * self.stride,), 255, dtype=torch.uint8)

    @property
    def rows(self) -> int:
        return self.pages * self.page_size

    @property
    def cache(self) -> Tensor:
        strides = (self.stride, self.size, self.size, 1)
        return self.buffer.as_strided((self.pages, self.page_size, 1, self.size), strides)

    def put(self, slot: int, record: Tensor) -> None:
        """Stores one record where it belongs; nothing for a slot that is no row."""
        if not 0 <= slot < self.rows:
            return
        page, entry = divmod(slot, self.page_size)
        data = self.size - self.tail
        begin = page * self.stride + entry * data
        self.buffer[begin : begin + data] = record[:data]
        begin = page * self.stride + self.page_size * data + entry * self.tail
        self.buffer[begin : begin + self.tail] = record[data:]

    def with_records(self, slots: Tensor, records: Tensor) -> Tensor:
        """The whole buffer after storing the records in order, without changing this one."""
        after = Pages(self.size, self.pages, self.page_size, self.padding, self.tail)
        after.buffer = self.buffer.clone()
        for slot, record in zip(slots.tolist(), records, strict=True):
            after.put(slot, record)
        return after.buffer


def spread(*shape: int) -> Tensor:
    """Normal values times powers of two that change every 8 columns, some groups zero."""
    x = torch.randn(shape) * torch.exp2(torch.arange(shape[-1]) // 8 % 24 - 12.0)
    x[..., 128:192] = 0
    return x


INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
