# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_truth import E4M3, INT64_MAX, INT64_MIN, Pages, quantized
from torch import Tensor

import ds_flashdmla_moe as dsm
from threads import assert_same_bits
from tolerance import FLOATING


def keys(tokens: int, d: int) -> Tensor:
    return torch.randn(tokens, d) * torch.exp2(8 * torch.randn(tokens, 1))


def key_pages(d: int, pages: int, page_size: int, padding: int = 0) -> Pages:
    return Pages(d + 4, pages, page_size, padding, tail=4)


def records(k: Tensor) -> Tensor:
    return torch.cat(quantized(k, k.shape[-1], E4M3, "ue8m0"), -1)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("d", [1, 32, 128, 160])
def test_bytes_are_those_of_the_definition(d: int, dtype: torch.dtype) -> None:
    k = keys(6, d).clamp(-6e4, 6e4).to(dtype)
    pages = key_pages(d, 2, 5, padding=13)
    slots = torch.tensor([9, 0, 4, -1, 5, 3])
    expected = pages.with_records(slots, records(k))
    dsm.ops.indexer_k_insert(k, pages.cache, slots)
    assert torch.equal(pages.buffer, expected)


def test_golden_bytes() -> None:
    k = torch.zeros(2, 4)
    k[0] = torch.tensor([450, -225, 1, 0])  # scale 2: 225, -112.5, 0.5
    cache = torch.full((1, 3, 1, 8), 255, dtype=torch.uint8)
    dsm.ops.indexer_k_insert(k, cache, torch.tensor([2, 0]))
    expected = "00000000ffffffff76ee300000008034ffffffff00000040"
    assert bytes(cache.flatten().tolist()).hex() == expected


def test_scale_of_every_magnitude() -> None:
    k = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16)[:, None]
    pages = key_pages(1, len(k), 1)
    dsm.ops.indexer_k_insert(k, pages.cache, torch.arange(len(k)))
    assert torch.equal(pages.buffer.view(-1, 5), records(k))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_make_the_key_nan(bad: float) -> None:
    k = torch.ones(2, 8)
    k[0, 3] = bad
    cache = torch.zeros(1, 2, 1, 12, dtype=torch.uint8)
    dsm.ops.indexer_k_insert(k, cache, torch.arange(2))
    scales = cache.flatten()[16:].view(torch.float32)
    assert scales[0].isnan()
    assert scales[1] == 2.0**-8


def test_hostile_slots_and_duplicates() -> None:
    k, pages = keys(8, 16), key_pages(16, 2, 3)
    slots = torch.tensor([2, INT64_MIN, INT64_MAX, 6, 2**32, 2, -1, 2])
    expected = pages.with_records(slots, records(k))
    dsm.ops.indexer_k_insert(k, pages.cache, slots)
    assert torch.equal(pages.buffer, expected)


def test_same_bits_for_any_number_of_threads() -> None:
    k, slots = keys(2000, 32), torch.randint(-1, 50, (2000,))

    def run() -> list[Tensor]:
        pages = key_pages(32, 5, 10)
        dsm.ops.indexer_k_insert(k, pages.cache, slots)
        return [pages.buffer]

    assert_same_bits(run)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_page_arithmetic(data: Any) -> None:
    d = data.draw(st.sampled_from([1, 7, 32]))
    pages = key_pages(d, data.draw(st.integers(0, 4)), data.draw(st.integers(0, 5)), data.draw(st.integers(0, 50)))
    slots = torch.tensor(data.draw(st.lists(st.integers(-2, pages.rows + 1), max_size=6)), dtype=torch.int64)
    k = keys(len(slots), d)
    expected = pages.with_records(slots, records(k))
    dsm.ops.indexer_k_insert(k, pages.cache, slots)
    assert torch.equal(pages.buffer, expected)


def test_strided_keys_and_empty_problems() -> None:
    k, pages, slots = keys(6, 50)[::3, 9:41], key_pages(32, 2, 2), torch.tensor([3, 0])
    expected = pages.with_records(slots, records(k))
    dsm.ops.indexer_k_insert(k, pages.cache, slots)
    dsm.ops.indexer_k_insert(k[:0], pages.cache, slots[:0])
    dsm.ops.indexer_k_insert(k, pages.cache[:0], slots)
    assert torch.equal(pages.buffer, expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": torch.zeros(2, 30)}, r"cache must be \[pages, page_size, 1, d \+ 4\] = \[any, any, 1, 34\]"),
        ({"k": torch.zeros(2, 32, dtype=torch.int64)}, r"k must be \[tokens, d\]"),
        ({"cache": torch.zeros(1, 2, 1, 36)}, "cache must be .* got .* float32"),
        ({"cache": torch.zeros(1, 4, 1, 36, dtype=torch.uint8)[:, ::2]}, "cache must be without gaps inside a page"),
        ({"slots": torch.zeros(2, dtype=torch.int32)}, r"slots must be \[tokens\] = \[2\] int64"),
    ],
)
def test_bad_arguments_are_refused(changed: dict[str, Any], message: str) -> None:
    cache = torch.full((1, 2, 1, 36), 7, dtype=torch.uint8)
    good = {"k": torch.zeros(2, 32), "cache": cache, "slots": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match="indexer_k_insert: " + message):
        dsm.ops.indexer_k_insert(**(good | changed))
    assert (cache == 7).all()


def test_opcheck_and_compile() -> None:
    k, slots, cache = keys(3, 32), torch.tensor([2, -1, 0]), torch.zeros(2, 2, 1, 36, dtype=torch.uint8)
    torch.library.opcheck(torch.ops.dsm.indexer_k_insert.default, (k, cache, slots))
    pages = key_pages(32, 2, 2)
    expected = pages.with_records(slots, records(k))
    torch.compile(dsm.ops.indexer_k_insert, fullgraph=True, backend="aot_eager")(k, pages.cache, slots)
    assert torch.equal(pages.buffer, expected)
