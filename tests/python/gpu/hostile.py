# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Arguments with garbage wherever an operator has nothing to read."""

from __future__ import annotations

import math
from typing import Any

import torch
from cache_layouts import Pool, poison
from torch import Tensor

CUDA = torch.device("cuda", 0)
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
# Results of attention in these have rounded probabilities in them, whatever the row (accuracy.ROUNDED_TERMS).
HALF = (torch.float16, torch.bfloat16)


def int32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def moved(value: Any) -> Any:
    """On the GPU, with the strides that it has here, and what lies between its elements."""
    if not isinstance(value, Tensor):
        return value
    if value.is_contiguous():
        return value.to(CUDA)
    memory = value.as_strided((value.untyped_storage().nbytes() // value.element_size(),), (1,), 0).to(CUDA)
    return memory.as_strided(value.shape, value.stride(), value.storage_offset())


def widened(value: Any) -> Any:
    """In float64 where it is a plain tensor of numbers."""
    plain_numbers = isinstance(value, Tensor) and value.is_floating_point() and value.element_size() > 1
    return value.double() if plain_numbers else value


def lists(batch: int, s_q: int, topk: int, rows: int) -> Tensor:
    """Random rows but the last two, which are NaN, some twice, among indices that are none."""
    indices = torch.randint(0, max(rows - 2, 1), (batch, s_q, topk), dtype=torch.int32)
    hostile = int32([-1, INT_MIN, INT_MAX, rows, rows + 1, -rows - 1])
    return torch.where(torch.rand(indices.shape) < 0.3, hostile[torch.randint(6, indices.shape)], indices)


def poisoned(pool: Pool) -> Tensor:
    """Its cache, with NaN in the two rows that `lists` does not name."""
    for row in (1, 2):
        poison(pool, len(pool.values) - row)
    return pool.cache


def pages_of(batch: int, page_size: int, h_kv: int, width: int, max_pages: int) -> tuple[Tensor, Tensor]:
    """A cache of randn with a page that nobody has, full of NaN, and tables of all other pages."""
    cache = torch.randn(batch * max_pages + 1, page_size, h_kv, width)
    cache[-1] = math.nan
    return cache, torch.randperm(batch * max_pages).reshape(batch, max_pages).int()


def hide_unused(cache: Tensor, table: Tensor, lengths: list[int]) -> None:
    """NaN in the entries behind the lengths, garbage in the table behind them."""
    page_size = cache.shape[1]
    for b, length in enumerate(lengths):
        used = -(-length // page_size)
        if length % page_size:
            cache[int(table[b, used - 1]), length % page_size :] = math.nan
        for page in table[b, used:].tolist():
            cache[page] = math.nan
        table[b, used:] = int32([-1, INT_MAX, INT_MIN, len(cache), len(cache) - 1]).repeat(table.shape[1])[
            : table.shape[1] - used
        ]
