# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Caches filled with random codes, decoded here byte by byte as the formats are published."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

FORMATS = {656: 576, 352: 576, 584: 512, 528: 512, 288: 512}  # bytes of a row: values
BYTE_TYPES = (torch.uint8, torch.int8, torch.float8_e4m3fn)


class Pool(NamedTuple):
    cache: Tensor  # [pages, page_size, 1, bytes] or [pages, page_size, 1, width]
    values: Tensor  # [pages * page_size, width] float64


def e4m3(codes: Tensor) -> Tensor:
    """Sign, four exponent bits (bias 7), three mantissa bits, no infinities, NaN where all of them are ones."""
    codes = codes.view(torch.uint8).int()
    exponent, mantissa = codes >> 3 & 15, (codes & 7).double()
    magnitude = torch.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent.double() - 10), mantissa * 2.0**-9)
    return torch.where(codes & 127 == 127, math.nan, torch.where(codes > 127, -magnitude, magnitude))


def e2m1(packed: Tensor) -> Tensor:
    """Two codes to a byte, the even one in the low nibble: sign, two exponent bits, one mantissa bit."""
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()
    return torch.where(codes > 7, -1.0, 1.0) * magnitudes[codes & 7]


def e8m0(codes: Tensor) -> Tensor:
    return torch.where(codes == 255, math.nan, 2.0 ** (codes.double() - 127))


def bfloat16(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.bfloat16).double()


def scaled(elements: Tensor, scales: Tensor) -> Tensor:
    """Each group of elements times its scale, in float32."""
    size = elements.shape[-1] // scales.shape[-1]
    return (elements.float() * scales.float().repeat_interleave(size, -1)).double()


def decode(pages: Tensor, page_size: int, row_bytes: int) -> Tensor:
    """``[pages * page_size, width]`` values of ``[pages, page_size * row_bytes]`` bytes."""
    if row_bytes == 584:  # a page is all rows' data and then all rows' scales
        data, scales = pages[:, : page_size * 576].reshape(-1, 576), pages[:, page_size * 576 :].reshape(-1, 8)
        return torch.cat((scaled(e4m3(data[:, :448]), e8m0(scales[:, :7])), bfloat16(data[:, 448:])), -1)
    rows = pages.reshape(-1, row_bytes)
    if row_bytes == 656:
        scales = rows[:, 512:528].contiguous().view(torch.float32)
        return torch.cat((scaled(e4m3(rows[:, :512]), scales), bfloat16(rows[:, 528:])), -1)
    if row_bytes == 352:
        return torch.cat((scaled(e2m1(rows[:, :256]), e4m3(rows[:, 320:])), e4m3(rows[:, 256:320])), -1)
    if row_bytes == 528:
        return scaled(e4m3(rows[:, :512]), e8m0(rows[:, 512:]))
    return scaled(e2m1(rows[:, :256]), e4m3(rows[:, 256:]))


def quantised(row_bytes: int, page_count: int, page_size: int, dtype: torch.dtype = torch.uint8, pad: int = 0) -> Pool:
    """Random codes with values of about 1. Pages are ``pad`` bytes apart, which hold 0xFF, i.e. NaN."""
    count = page_count * page_size

    def elements(*shape: int) -> Tensor:
        codes = torch.randint(0, 256, shape, dtype=torch.uint8)
        return torch.where(codes & 127 == 127, 0, codes)

    def rotary() -> Tensor:
        return torch.randn(count, 64).bfloat16().view(torch.uint8)

    def powers(groups: int) -> Tensor:
        return torch.randint(117, 122, (count, groups), dtype=torch.uint8)

    def small(groups: int) -> Tensor:  # e4m3 codes of 2^-3 to 2
        return torch.randint(0x20, 0x41, (count, groups), dtype=torch.uint8)

    tail = None
    if row_bytes == 656:
        scales = (torch.rand(count, 4) * 0.02).view(torch.uint8)
        parts = [elements(count, 512), scales, rotary()]
    elif row_bytes == 352:
        parts = [elements(count, 256), small(64), small(32)]
    elif row_bytes == 584:
        parts, tail = [elements(count, 448), rotary()], torch.cat((powers(7), torch.zeros(count, 1)), -1).byte()
    elif row_bytes == 528:
        parts = [elements(count, 512), powers(16)]
    else:
        parts = [elements(count, 256), small(32)]
    pages = torch.cat(parts, -1).reshape(page_count, -1)
    if tail is not None:
        pages = torch.cat((pages, tail.reshape(page_count, -1)), -1)
    memory = torch.full((page_count, pages.shape[1] + pad), 0xFF, dtype=torch.uint8)
    memory[:, : pages.shape[1]] = pages
    cache = memory.as_strided((page_count, page_size, 1, row_bytes), (memory.stride(0), row_bytes, row_bytes, 1))
    return Pool(cache.view(dtype), decode(pages, page_size, row_bytes))


def plain(width: int, page_count: int, page_size: int, dtype: torch.dtype, pad: int = 0) -> Pool:
    memory = torch.full((page_count, page_size * width + pad), torch.nan).to(dtype)
    cache = memory[:, : page_size * width].unflatten(1, (page_size, 1, width))
    cache.copy_(torch.randn(cache.shape))
    return Pool(cache, cache.reshape(-1, width).double())


def of_rows(row_bytes: int, page_count: int, page_size: int, pad: int = 0) -> Pool:
    """Of the format that has rows of so many bytes, bfloat16 if none has; pages are ``pad`` bytes apart."""
    if row_bytes in FORMATS:
        return quantised(row_bytes, page_count, page_size, pad=pad)
    return plain(row_bytes // 2, page_count, page_size, torch.bfloat16, pad // 2)


def poison(pool: Pool, row: int) -> None:
    """Makes a row NaN, in all its bytes."""
    page_count, page_size, _, row_bytes = pool.cache.shape
    page, entry = divmod(row, page_size)
    assert page < page_count
    if pool.cache.is_floating_point() and pool.cache.element_size() > 1:
        pool.cache[page, entry] = torch.nan
    else:
        data = pool.cache.view(torch.uint8)[page].reshape(-1)
        if row_bytes == 584:
            data[entry * 576 : (entry + 1) * 576] = 0xFF
            data[page_size * 576 + entry * 8 : page_size * 576 + (entry + 1) * 8] = 0xFF
        else:
            data[entry * row_bytes : (entry + 1) * row_bytes] = 0xFF
    pool.values[row] = torch.nan
