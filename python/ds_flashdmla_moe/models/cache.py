# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Paged caches of latent rows, one per layer, which the requests of a batch fill at their own pace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PAGE_SIZE", "PagedCache", "Step"]

PAGE_SIZE = 64


class PagedCache:
    """Rows of ``width`` numbers per layer and token in pages that all layers number alike.

    Args:
        capacities: tokens that each request may come to have.
        page_order: the pages in the order in which they are handed out; ``None``: increasing.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        capacities: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        page_order: Tensor | None = None,
    ) -> None:
        pages = [-(-capacity // PAGE_SIZE) for capacity in capacities]
        order = torch.arange(sum(pages)) if page_order is None else page_order
        self.pools = [torch.zeros(sum(pages), PAGE_SIZE, 1, width, dtype=dtype, device=device) for _ in range(layers)]
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
        slots = table.gather(1, positions // PAGE_SIZE).long() * PAGE_SIZE + positions % PAGE_SIZE
        return Step(self.pools, table, (start + new).int(), positions, slots, not any(before))


@dataclass(frozen=True)
class Step:
    """New tokens of some requests: ``positions`` and ``slots`` [batch, new]; ``lengths`` [batch] include them.

    ``fresh``: these are the first tokens of all.
    """

    pools: list[Tensor]
    block_table: Tensor
    lengths: Tensor
    positions: Tensor
    slots: Tensor
    fresh: bool

    def append(self, layer: int, rows: Tensor) -> Tensor:
        """Write rows [batch, new, width] to a layer's pages; returns these."""
        pool = self.pools[layer]
        pool.view(-1, pool.shape[-1])[self.slots.flatten()] = rows.flatten(0, 1).to(pool.dtype)
        return pool
