# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Paged caches, which the requests of a batch fill at their own pace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops

__all__ = ["PAGE_SIZE", "PagedCache", "Row", "Step", "stored"]

PAGE_SIZE = 64


@dataclass(frozen=True)
class Row:
    """What a cache holds of a token: so many elements of a dtype."""

    width: int
    dtype: torch.dtype

    def pages(self, count: int, device: torch.device) -> Tensor:
        return torch.zeros(count, PAGE_SIZE, 1, self.width, dtype=self.dtype, device=device)


class PagedCache:
    """For every layer one pool of pages of each kind of row; all pools number their pages alike.

    Args:
        layers: their number.
        rows: the kinds of row that each layer has.
        capacities: tokens that each request may come to have.
        page_order: the pages in the order in which they are handed out; ``None``: increasing.
    """

    def __init__(
        self,
        layers: int,
        rows: Sequence[Row],
        capacities: Sequence[int],
        device: torch.device,
        page_order: Tensor | None = None,
    ) -> None:
        pages = [-(-capacity // PAGE_SIZE) for capacity in capacities]
        order = torch.arange(sum(pages)) if page_order is None else page_order
        self.pools = [[row.pages(sum(pages), device) for row in rows] for _ in range(layers)]
        self.block_table = torch.zeros(len(pages), max(pages, default=0), dtype=torch.int32)
        first = 0
        for request, count in enumerate(pages):
            self.block_table[request, :count] = order[first : first + count]
            first += count
        self.block_table = self.block_table.to(device)
        self.lengths = [0] * len(pages)

    def extend(self, requests: Sequence[int], new: int) -> Step:
        """Give each of these requests ``new`` more tokens, whose rows the layers then write."""
        device = self.block_table.device
        before = [self.lengths[request] for request in requests]
        for request in requests:
            self.lengths[request] += new
        start = torch.tensor(before, device=device)
        positions = start[:, None] + torch.arange(new, device=device)
        table = self.block_table[torch.tensor(requests, device=device)]
        return Step(self.pools, table, (start + new).int(), positions, not any(before))


@dataclass(frozen=True)
class Step:
    """New tokens of some requests: their ``positions`` [batch, new]; ``lengths`` [batch] include them.

    ``fresh``: these are the first tokens of all.
    """

    pools: list[list[Tensor]]
    block_table: Tensor
    lengths: Tensor
    positions: Tensor
    fresh: bool

    def slots(self, indices: Tensor) -> Tensor:
        """The rows in the pools of each request's tokens [batch, …]; what is below 0 stays so."""
        flat = indices.clamp_min(0).flatten(1).long()
        pages = self.block_table.gather(1, flat // PAGE_SIZE).long()
        slots = (pages * PAGE_SIZE + flat % PAGE_SIZE).view(indices.shape)
        return torch.where(indices < 0, -1, slots)

    def append(self, pool: Tensor, rows: Tensor, d_latent: int) -> None:
        """Write rows ``[latent | rotated key]`` [batch, new, …] of the new tokens to a layer's pool."""
        flat = rows.flatten(0, 1)
        ops.mla_kv_insert(flat[:, :d_latent], flat[:, d_latent:], pool, self.slots(self.positions).flatten())


class _Stored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, d_latent: int, row: Row) -> Tensor:
        flat = rows.flatten(0, -2)
        pool = row.pages(-(-len(flat) // PAGE_SIZE), rows.device)
        slots = torch.arange(len(flat), device=rows.device)
        ops.mla_kv_insert(flat[:, :d_latent], flat[:, d_latent:], pool, slots)
        return ops.kv_gather(pool, slots.int(), rows.dtype).view_as(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None, None


def stored(rows: Tensor, d_latent: int, row: Row) -> Tensor:
    """Rows [..., d_latent + d_rope] as a cache gives them back; the gradient passes as if nothing were rounded."""
    if row.dtype.is_floating_point and torch.promote_types(rows.dtype, row.dtype) == row.dtype:
        return rows
    return _Stored.apply(rows, d_latent, row)  # type: ignore[no-any-return, no-untyped-call]
