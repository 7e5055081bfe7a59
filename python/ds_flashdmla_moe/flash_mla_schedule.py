# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""FlashMLA's plan of who computes what when decoding: the keys of all requests, cut into parts of equal cost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["decoding_lengths", "parts_of", "split_requests"]

BLOCK_TOKENS = 64  # keys of a block, the unit that requests are cut in
OVERHEAD_BLOCKS = 5  # what starting a request costs a part, in blocks
ROWS_OF_A_PART = 64  # query rows (heads × positions of a key head) that one processor works on


def parts_of(device: torch.device, rows: int, h_kv: int) -> int:
    """How many parts there are: one for every processor (CPU thread) that a group of query rows and key head gets."""
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    else:
        processors = torch.get_num_threads()
    return max(processors // max(h_kv, 1) // max(-(-rows // ROWS_OF_A_PART), 1), 1)


def decoding_lengths(
    batch: int,
    cache_seqlens: Tensor | None,
    topk: int | None,
    topk_length: Tensor | None,
    extra_topk: int | None,
    extra_topk_length: Tensor | None,
) -> list[int]:
    """Keys of every request; lists of a second cache begin on a block of their own."""
    if topk is None:
        return [0] * batch if cache_seqlens is None else cache_seqlens.tolist()

    def listed(most: int, length: Tensor | None) -> list[int]:
        return [most] * batch if length is None else length.clamp(0, most).tolist()

    first = [max(keys, 1) for keys in listed(topk, topk_length)]
    if extra_topk is None:
        return first
    extra = listed(extra_topk, extra_topk_length)
    return [-(-a // BLOCK_TOKENS) * BLOCK_TOKENS + b for a, b in zip(first, extra, strict=True)]


def split_requests(lengths: Sequence[int], parts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The keys of all requests in order, cut into ``parts`` runs of blocks of equal cost.

    Args:
        lengths: keys of every request.
        parts: how many.
        device: of the results.

    Returns:
        ``[parts, 8]`` int32: first request, last request (inclusive; before the first: no work), first block of the
        first request, end block of the last one (exclusive), index of the part among the splits of its first request,
        whether its first and its last request are split between parts, 0. And ``[batch + 1]`` int32: the number of
        splits of all requests before each.
    """
    blocks = [max(-(-length // BLOCK_TOKENS), 1) for length in lengths]
    budget = -(-sum(count + OVERHEAD_BLOCKS for count in blocks) // parts) + OVERHEAD_BLOCKS
    rows, splits = [], [0]
    request = block = split = 0
    for _ in range(parts):
        first, first_block, first_split, left = request, block, split, budget
        while request < len(blocks) and blocks[request] - block + OVERHEAD_BLOCKS <= left:
            left -= blocks[request] - block + OVERHEAD_BLOCKS
            splits.append(splits[-1] + split + 1)
            request, block, split = request + 1, 0, 0
        if request < len(blocks) and left > OVERHEAD_BLOCKS:
            block, split = block + left - OVERHEAD_BLOCKS, split + 1
        last = request if block > 0 else request - 1
        whole = blocks[last] if last >= 0 and lengths[last] > 0 else 0
        end_block = block or whole
        first_is_split, last_is_split = first_block > 0, end_block != whole
        if first == last:
            first_is_split = last_is_split = first_is_split or last_is_split
        rows.append([first, last, first_block, end_block, first_split, first_is_split, last_is_split, 0])
    return (
        torch.tensor(rows, dtype=torch.int32, device=device),
        torch.tensor(splits, dtype=torch.int32, device=device),
    )
