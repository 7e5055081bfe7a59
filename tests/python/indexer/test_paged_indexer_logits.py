# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import ds_flashdmla_moe as dsm
from threads import assert_same_bits
from tolerance import FLOATING, assert_close

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
GARBAGE = (-1, INT_MIN, INT_MAX)
FP8 = torch.float8_e4m3fn


def paged_fp8(k: Tensor, page_size: int, pages: list[int], padding: int = 0) -> Tensor:
    """The FP8 cache, written byte by byte by the layout's description; everything else is 0xFF, NaN as E4M3."""
    d = k.shape[1]
    values, scale = dsm.ops.hadamard_quantize(k, "fp8", rotate=False)
    memory = torch.full((max(pages, default=0) + 2, page_size * (d + 4) + padding), 0xFF, dtype=torch.uint8)
    for j in range(k.shape[0]):
        page, entry = memory[pages[j // page_size]], j % page_size
        page[entry * d : (entry + 1) * d] = values[j].view(torch.uint8)
        at = page_size * d + 4 * entry
        page[at : at + 4] = scale[j : j + 1].view(torch.uint8)
    return memory[:, : page_size * (d + 4)].unflatten(1, (page_size, 1, d + 4))


def paged(k: Tensor, page_size: int, pages: list[int], padding: int = 0) -> Tensor:
    memory = torch.full((max(pages, default=0) + 2, page_size * k.shape[1] + padding), math.nan, dtype=k.dtype)
    cache = memory[:, : page_size * k.shape[1]].unflatten(1, (page_size, 1, k.shape[1]))
    for j in range(k.shape[0]):
        cache[pages[j // page_size], j % page_size, 0] = k[j]
    return cache


def request(s_q: int, keys: int, heads: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    return torch.randn(s_q, heads, d).to(dtype), torch.randn(keys, d).to(dtype), torch.randn(s_q, heads, dtype=wide)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize(("keys", "page_size"), [(1, 1), (23, 5), (64, 64), (300, 7), (129, 128)])
@pytest.mark.parametrize("fp8", [False, True])
def test_same_bits_as_without_pages(keys: int, page_size: int, fp8: bool, dtype: torch.dtype) -> None:
    if fp8 and dtype == torch.float64:
        pytest.skip("FP8 keys are for float32 arithmetic")
    q, k, weights = request(2, keys, 3, 16, dtype)
    table = torch.randperm(-(-keys // page_size)).tolist()
    cache = paged_fp8(k.float(), page_size, table, 12) if fp8 else paged(k, page_size, table, 6)
    lens = torch.tensor([[keys, max(0, keys - 1)]], dtype=torch.int32)
    # Beyond the context the table holds anything.
    block_table = torch.tensor([[*table, *GARBAGE]], dtype=torch.int32)
    logits = dsm.ops.paged_indexer_logits(q[None], cache, weights[None], lens, block_table, max_len=keys + 2)
    scale = None
    if fp8:
        k, scale = dsm.ops.hadamard_quantize(k.float(), "fp8", rotate=False)
    expected = dsm.ops.indexer_logits(q, k, weights, scale, ends=lens[0])
    assert torch.equal(logits[0, :, :keys], expected)
    if fp8:
        again = dsm.ops.paged_indexer_logits(q[None], cache.view(FP8), weights[None], lens, block_table, keys + 2)
        assert torch.equal(again, logits)
    assert (logits[0, :, keys:] == -math.inf).all()


def test_golden_page() -> None:
    # Two entries of d = 2 in E4M3: (1, 2) · 0.5 and (−1, 4) · 2; the scales follow all values of the page.
    page = bytes([0x38, 0x40, 0xB8, 0x48]) + torch.tensor([0.5, 2.0]).numpy().tobytes()
    cache = torch.frombuffer(bytearray(page), dtype=torch.uint8).view(1, 2, 1, 6)
    q = torch.tensor([[[[1.0, 1.0], [1.0, -1.0]]]])
    weights = torch.tensor([[[1.0, 10.0]]])
    table = torch.zeros(1, 1, dtype=torch.int32)
    logits = dsm.ops.paged_indexer_logits(q, cache, weights, torch.tensor([2], dtype=torch.int32), table)
    assert logits.tolist() == [[[1.5, 6.0]]]


def test_requests_of_every_length() -> None:
    page_size, heads, d = 4, 2, 8
    lengths = [0, 1, 3, 4, 5, 12]
    q = torch.randn(len(lengths), 1, heads, d)
    weights = torch.randn(len(lengths), 1, heads)
    cache = torch.full((20, page_size, 1, d), math.nan)
    block_table = torch.full((len(lengths), 3), INT_MAX, dtype=torch.int32)
    page = 0
    for b, length in enumerate(lengths):
        for column in range(-(-length // page_size)):
            block_table[b, column] = page
            cache[page, : length - column * page_size] = torch.randn(min(page_size, length - column * page_size), 1, d)
            page += 1
    lens = torch.tensor(lengths, dtype=torch.int32)
    logits = dsm.ops.paged_indexer_logits(q, cache, weights, lens, block_table)
    assert logits.shape == (len(lengths), 1, 12)
    for b, length in enumerate(lengths):
        keys = cache[block_table[b, : -(-length // page_size)].long()].reshape(-1, d)[:length]
        truth = (weights[b, 0].double()[:, None] * (q[b, 0].double() @ keys.double().T).relu()).sum(0)
        assert_close(f"length {length}", logits[b, 0, :length], truth, scale=50.0)
        assert (logits[b, 0, length:] == -math.inf).all()


@pytest.mark.parametrize("length", [-1, INT_MIN, INT_MAX, 7])
def test_hostile_lengths_and_tables(length: int) -> None:
    q, k, weights = request(1, 6, 2, 8, torch.float32)
    cache = paged(k, 2, [0, 1, 2])[:3]
    lens = torch.tensor([length], dtype=torch.int32)
    table = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    visible = min(max(length, 0), 6)
    clean = dsm.ops.paged_indexer_logits(q[None], cache, weights[None], lens, table)
    assert (clean[..., visible:] == -math.inf).all()
    assert clean[..., :visible].isfinite().all()
    # Pages that do not exist, inside the context: their keys are hidden, the others as before. Duplicates are allowed.
    for bad in (*GARBAGE, 3):
        table = torch.tensor([[0, bad, 0]], dtype=torch.int32)
        logits = dsm.ops.paged_indexer_logits(q[None], cache, weights[None], lens, table)
        assert torch.equal(logits[..., :2], clean[..., :2])
        assert (logits[..., 2:4] == -math.inf).all()
        assert torch.equal(logits[..., 4:6], clean[..., :2])


def test_empty_problems() -> None:
    def call(batch: int, s_q: int, heads: int, pages: int, columns: int) -> Tensor:
        return dsm.ops.paged_indexer_logits(
            torch.ones(batch, s_q, heads, 4),
            torch.ones(pages, 2, 1, 4),
            torch.ones(batch, s_q, heads),
            torch.full((batch, s_q), 2, dtype=torch.int32),
            torch.zeros(batch, columns, dtype=torch.int32),
        )

    assert call(0, 1, 1, 1, 1).shape == (0, 1, 2)
    assert call(1, 0, 1, 1, 1).shape == (1, 0, 2)
    assert call(1, 1, 1, 1, 0).shape == (1, 1, 0)
    assert call(1, 1, 1, 0, 1).tolist() == [[[-math.inf] * 2]]
    assert call(1, 1, 0, 1, 1).tolist() == [[[0.0, 0.0]]]


def test_strided_views_and_same_bits() -> None:
    batch, s_q, heads, d, page_size = 3, 2, 4, 16, 3
    q = torch.randn(batch, 2 * s_q, heads, d)[:, ::2]
    cache = torch.randn(9, 2 * page_size, 1, d)[:, ::2]
    weights = torch.randn(batch, heads, s_q).transpose(1, 2)
    lens = torch.tensor([[9, 8, 7], [3, 2, 1]], dtype=torch.int32).T
    table = torch.randperm(18)[:9].remainder(9).int().view(batch, 3)
    views = q, cache, weights, lens, table
    logits = dsm.ops.paged_indexer_logits(*views)
    assert torch.equal(logits, dsm.ops.paged_indexer_logits(*(v.contiguous() for v in views)))
    assert_same_bits(lambda: [dsm.ops.paged_indexer_logits(*views)])


GOOD = {
    "q": torch.zeros(2, 1, 3, 8),
    "cache": torch.zeros(4, 5, 1, 8),
    "weights": torch.zeros(2, 1, 3),
    "context_lens": torch.zeros(2, 1, dtype=torch.int32),
    "block_table": torch.zeros(2, 6, dtype=torch.int32),
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": GOOD["q"][0]}, "q must be of 4 dimensions"),
        ({"cache": torch.zeros(4, 5, 1, 9)}, r"cache must be \[pages, page_size, 1, d\] = \[any, any, 1, 8\] float32"),
        ({"cache": torch.zeros(4, 5, 1, 8, dtype=torch.uint8)}, r"cache must be \[pages, page_size, 1, d \+ 4\]"),
        ({"cache": torch.zeros(4, 5, 1, 13, dtype=torch.uint8)[..., :12]}, "cache must be d . 4 = 12 bytes per entry"),
        ({"cache": torch.zeros(4, 0, 1, 8)}, "page_size must be at least 1"),
        ({"q": GOOD["q"].to(FP8)}, r"cache must be .* uint8\|int8\|float8_e4m3fn, got .* float32"),
        ({"weights": torch.zeros(2, 1, 4)}, r"weights must be \[batch, s_q, heads\]"),
        ({"context_lens": torch.zeros(2, 1)}, r"context_lens must be \[batch, s_q\] = \[2, 1\] int32"),
        ({"context_lens": torch.zeros(3, dtype=torch.int32)}, "context_lens must be"),
        ({"block_table": torch.zeros(3, 6, dtype=torch.int32)}, r"block_table must be \[batch, max_pages\]"),
        ({"max_len": -1}, "max_len must be at least 0, got -1"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dsm.ops.paged_indexer_logits(**(GOOD | arguments))


def test_opcheck_and_compile() -> None:
    q, k, weights = request(2, 7, 2, 8, torch.float32)
    cache = paged_fp8(k, 4, [1, 0])
    lens = torch.tensor([[7, 6]], dtype=torch.int32)
    table = torch.tensor([[1, 0]], dtype=torch.int32)
    torch.library.opcheck(torch.ops.dsm.paged_indexer_logits.default, (q[None], cache, weights[None], lens, table, 8))
    compiled = torch.compile(dsm.ops.paged_indexer_logits, fullgraph=True, backend="aot_eager")
    arguments = q[None], cache, weights[None], lens, table
    assert torch.equal(compiled(*arguments), dsm.ops.paged_indexer_logits(*arguments))
