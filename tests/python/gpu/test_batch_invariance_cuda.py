# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""With batch_invariant, a request gives the same bits alone, in any batch and at any place in it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from cache_layouts import of_rows
from hostile import CUDA, int32, moved
from torch import Tensor

import ds_flashdmla_moe as dsm
from ds_flashdmla_moe.flash_mla import FlashMLASchedMeta, flash_mla_with_kvcache

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LENGTHS = (1, 17000, 64, 0, 2049, 700, 2048, 5000, 63, 40000, 4097, 130)
# Requests, in their order: others beside them, none, the same ones twice.
CHOICES = ([1], [9, 9], [4, 7, 1], [10, 2, 3, 6, 0, 11], list(reversed(range(len(LENGTHS)))), [9, *[5] * 150])

Call = Callable[[list[int]], tuple[Tensor, Tensor]]


def dense(dtype: torch.dtype, s_q: int, h_q: int, through_flash_mla: bool = False) -> Call:
    """Of the chosen requests, whose table is as wide as the longest of them needs."""
    pages_of = [-(-length // 64) for length in LENGTHS]
    cache = torch.randn(sum(pages_of), 64, 1, 576, dtype=dtype, device=CUDA)
    ends = list(accumulate(pages_of))
    order = torch.randperm(ends[-1], dtype=torch.int32, device=CUDA)
    pages = [order[end - count : end] for end, count in zip(ends, pages_of, strict=True)]
    q = torch.randn(len(LENGTHS), s_q, h_q, 576, dtype=dtype, device=CUDA)

    def call(chosen: list[int]) -> tuple[Tensor, Tensor]:
        table = torch.nn.utils.rnn.pad_sequence([pages[i] for i in chosen], batch_first=True)
        lengths = torch.tensor([LENGTHS[i] for i in chosen], dtype=torch.int32, device=CUDA)
        arguments = (q[chosen], cache, table, lengths, 512)
        if through_flash_mla:
            return flash_mla_with_kvcache(*arguments, FlashMLASchedMeta(), causal=True, enable_batch_invariant=True)
        return dsm.ops.mla_decode(*arguments, causal=True, batch_invariant=True)

    return call


def sparse(row_bytes: int, h_q: int, topk: int) -> Call:
    """Of the chosen requests, of whose lists as much counts as of the longest one's."""
    rows = 4096
    pool = of_rows(row_bytes, 64, 64)
    cache = moved(pool.cache)
    counts = [min(length, topk) for length in LENGTHS]
    indices = torch.randint(0, rows, (len(LENGTHS), 2, topk), dtype=torch.int32, device=CUDA)
    q = torch.randn(len(LENGTHS), 2, h_q, pool.values.shape[1], dtype=torch.bfloat16, device=CUDA)
    sink = torch.randn(h_q, device=CUDA)

    def call(chosen: list[int]) -> tuple[Tensor, Tensor]:
        longest = max(counts[i] for i in chosen)
        lengths = torch.tensor([counts[i] for i in chosen], dtype=torch.int32, device=CUDA)
        return dsm.ops.sparse_mla_decode(
            q[chosen],
            cache,
            indices[chosen, :, :longest],
            attn_sink=sink,
            topk_length=lengths,
            extra_k_cache=cache,
            extra_indices=indices[chosen, :, : max(longest // 2, 1)],
            extra_topk_length=lengths // 2,
            batch_invariant=True,
        )

    return call


CALLS = {
    "dense 128 heads": lambda: dense(torch.bfloat16, 1, 128),
    "dense 16 heads, three queries": lambda: dense(torch.float16, 3, 16),
    "dense float32": lambda: dense(torch.float32, 1, 5),
    "flash_mla": lambda: dense(torch.bfloat16, 2, 64, through_flash_mla=True),
    "sparse V4": lambda: sparse(584, 64, 5000),
    "sparse V4, 16 heads": lambda: sparse(584, 16, 5000),
    "sparse V3.2": lambda: sparse(656, 128, 2048),
    "sparse V3.2, 16 heads": lambda: sparse(656, 16, 2048),
    "sparse bfloat16": lambda: sparse(1024, 64, 3000),
    "sparse, 544 columns": lambda: sparse(1088, 16, 3000),
}


@pytest.mark.parametrize("make", CALLS.values(), ids=list(CALLS))
def test_bits_do_not_depend_on_the_batch(make: Callable[[], Call]) -> None:
    torch.manual_seed(0)
    call = make()
    out, lse = call(list(range(len(LENGTHS))))
    assert not out.isnan().any()
    for chosen in CHOICES:
        some, some_lse = call(chosen)
        assert torch.equal(some, out[chosen])
        assert torch.equal(some_lse, lse[chosen])


def test_prompts_beside_long_tables_take_little_memory() -> None:
    """Thousands of positions keep the GPU busy without cutting their requests, whatever there is room for."""
    q = torch.randn(2, 4000, 16, 576, dtype=torch.bfloat16, device=CUDA)
    cache, lengths = torch.randn(8, 64, 1, 576, dtype=torch.bfloat16, device=CUDA), int32([500, 130]).to(CUDA)
    table = torch.arange(8, dtype=torch.int32, device=CUDA).repeat(2, 2048)
    out, lse = dsm.ops.mla_decode(q, cache, table[:, :8], lengths, 512, batch_invariant=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    again, lse_again = dsm.ops.mla_decode(q, cache, table, lengths, 512, batch_invariant=True)
    assert torch.cuda.max_memory_allocated() - before < out.nbytes + lse.nbytes + (64 << 20)
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)
