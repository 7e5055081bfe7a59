# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Caches and results of more than 2^31 elements, and requests of a million tokens, on every implementation row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cache_layouts import of_rows
from calls import forced
from hostile import CUDA, HOPPER, INT_MAX, int32
from torch import Tensor

import ds_flashdmla_moe as dsm
from tolerance import assert_close

GIB = 1 << 30
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.mem_get_info(CUDA)[0] < 24 * GIB, reason="needs 24 GiB of GPU memory"
    ),
]

BF16 = torch.bfloat16
ROWS = pytest.mark.parametrize(
    "row", [pytest.param("sm90", marks=pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")), "cuda"]
)
FAR = 2**31  # elements
MILLION = 1 << 20


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    yield
    torch.cuda.empty_cache()


def nan(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    if dtype == torch.uint8:
        return torch.full(shape, 255, dtype=dtype, device=CUDA)
    return torch.full(shape, math.nan, dtype=dtype, device=CUDA)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device=CUDA).to(BF16)


def assert_same(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> None:
    assert not left[0].isnan().any()
    assert all(torch.equal(*pair) for pair in zip(left, right, strict=True))


def apart(tensor: Tensor) -> Tensor:
    """The same values, those of its first dimension so far apart that the last is behind 2^31 elements; NaN between."""
    rows = len(tensor)
    stride = -(-FAR // (rows - 1) // 64) * 64
    memory = nan((rows - 1) * stride + tensor[0].numel())
    spread = memory.as_strided(tensor.shape, (stride, *tensor.stride()[1:]))
    return spread.copy_(tensor)


# --- offsets beyond 2^31 elements: the same bits as from a small cache ---


@ROWS
@pytest.mark.parametrize("h_q", [16, 128])
def test_dense_pages_far_away(h_q: int, row: str) -> None:
    few, page_size = 40, 64
    pages = FAR // (page_size * 576) + few
    cache = nan(pages, page_size, 1, 576)
    cache[-few:] = normal(few, page_size, 1, 576)
    q, lengths = normal(2, 2, h_q, 576), int32([1000, 1277]).to(CUDA)
    table = torch.arange(few, device=CUDA).flip(0).view(2, few // 2).int()
    with forced("mla_decode", row):
        expected = dsm.ops.mla_decode(q, cache[-few:].clone(), table, lengths, 512, causal=True)
        assert_same(
            dsm.ops.mla_decode(q, cache, table + (pages - few), lengths, 512, causal=True),
            expected,
        )
        out = apart(torch.zeros(2, 2, h_q, 512, dtype=BF16, device=CUDA))
        assert_same(
            dsm.ops.mla_decode(apart(q), cache[-few:], table, lengths, 512, causal=True, out=out),
            expected,
        )


@ROWS
@pytest.mark.parametrize(
    ("row_bytes", "extra_bytes"), [(656, None), (352, None), (584, 584), (528, 288), (1152, None), (1024, 1024)]
)
def test_sparse_records_far_away(row_bytes: int, extra_bytes: int | None, row: str) -> None:
    few, page_size = 6, 64

    def pools(size: int) -> tuple[Tensor, Tensor]:
        """A cache of more than 2^32 bytes whose last pages are those of the other."""
        near = of_rows(size, few, page_size).cache.to(CUDA)
        cache = nan(2**32 // (page_size * size) + few, *near.shape[1:], dtype=near.dtype)
        cache[-few:] = near
        return near, cache

    near, far = pools(row_bytes)
    q = normal(2, 1, 64, 512 if row_bytes in (584, 528, 1024) else 576)
    indices = torch.randint(few * page_size, (2, 1, 200), device=CUDA).int()
    options: list[dict[str, Any]] = [{}, {}]
    if extra_bytes:
        caches = pools(extra_bytes)
        options = [
            {"extra_k_cache": cache, "extra_indices": indices + (len(cache) - few) * page_size} for cache in caches
        ]
    with forced("sparse_mla_decode", row):
        assert_same(
            dsm.ops.sparse_mla_decode(q, far, indices + (len(far) - few) * page_size, 512, **options[1]),
            dsm.ops.sparse_mla_decode(q, near, indices, 512, **options[0]),
        )


@ROWS
@pytest.mark.parametrize("d_qk", [512, 576])
def test_prefill_rows_far_away(d_qk: int, row: str) -> None:
    few = 100
    rows = FAR // d_qk + few
    kv, q = nan(rows, 1, d_qk), normal(3, 64, d_qk)
    kv[-few:] = normal(few, 1, d_qk)
    near, indices = kv[-few:].clone(), torch.randint(few, (3, 1, 150), device=CUDA).int()
    with forced("sparse_mla_prefill", row):
        expected = dsm.ops.sparse_mla_prefill(q, near, indices)
        assert_same(dsm.ops.sparse_mla_prefill(q, kv, indices + (rows - few)), expected)
        del kv
        out = apart(torch.zeros(3, 64, 512, dtype=BF16, device=CUDA))
        assert_same(dsm.ops.sparse_mla_prefill(apart(q), apart(near), indices, out=out), expected)


@pytest.mark.parametrize("size", [656, 352, 584, 528, 288])
def test_records_inserted_and_gathered_far_away(size: int) -> None:
    pages = 2**32 // (64 * size) + 5
    cache, rows = nan(pages, 64, 1, size, dtype=torch.uint8), normal(5, 576)
    last = pages * 64 - 1
    near, slots = cache[:1].clone(), torch.tensor([last, 0, last // 2, 2**31 // size, last - 1], device=CUDA)
    for where, at in ((cache, slots), (near, torch.arange(5, device=CUDA))):
        if size in (656, 352):
            dsm.ops.mla_kv_insert(rows[:, :512], rows[:, 512:], where, at)
        else:
            dsm.ops.v4_kv_insert(rows[:, :512], where, at)
    expected = dsm.ops.kv_gather(near, torch.arange(5, device=CUDA).int())
    assert_same((dsm.ops.kv_gather(cache, slots.int()),), (expected,))


def test_plain_rows_inserted_and_gathered_far_away() -> None:
    pages = FAR // (64 * 576) + 5
    cache, rows = torch.zeros(pages, 64, 1, 576, dtype=BF16, device=CUDA), normal(3, 576)
    slots = torch.tensor([pages * 64 - 1, 1, pages * 64 - 70], device=CUDA)
    dsm.ops.mla_kv_insert(rows[:, :512], rows[:, 512:], cache, slots)
    assert_same((dsm.ops.kv_gather(cache, slots.int()),), (rows,))
    assert_same((cache.flatten(0, 2)[slots],), (rows,))


def test_merging_more_than_two_to_the_31_elements() -> None:
    batch = FAR // (2 * 128 * 512) + 3
    outs, lses = nan(2, batch, 1, 128, 512), torch.full((2, batch, 128, 1), math.inf, device=CUDA)
    outs[:, -2:], lses[:, -2:] = normal(2, 2, 1, 128, 512), torch.randn(2, 2, 128, 1, device=CUDA)
    out, lse = dsm.ops.merge_attention_states(outs, lses)
    assert_same((out[-2:], lse[-2:]), dsm.ops.merge_attention_states(outs[:, -2:].clone(), lses[:, -2:].clone()))
    assert not out[:-2].any()


# --- requests of a million tokens ---


def truth(q: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Of queries [n, d_qk] over all keys, in float64: out [n, 512] and lse [n]."""
    wide = keys.double()
    scores = q.double() @ wide.mT * q.shape[-1] ** -0.5
    lse = scores.logsumexp(-1)
    return scores.sub_(lse[:, None]).exp_() @ wide[:, :512], lse


@ROWS
@pytest.mark.parametrize(("h_q", "s_q", "length"), [(16, 1, MILLION), (128, 1, MILLION), (8, 2, MILLION - 63)])
def test_dense_decode_of_a_million_tokens(h_q: int, s_q: int, length: int, row: str) -> None:
    pages = MILLION // 64
    cache, table = normal(pages, 64, 1, 576), torch.randperm(pages, device=CUDA).int()[None]
    wide_table = torch.cat((table, torch.full_like(table, INT_MAX)), 1)[:, : pages + 7]
    q = 2 * normal(1, s_q, h_q, 576)
    with forced("mla_decode", row):
        out, lse = dsm.ops.mla_decode(q, cache, wide_table, int32([length]).to(CUDA), 512, causal=True)
    for i in range(s_q):
        expected, expected_lse = truth(q[0, i], cache[table[0].long()].view(-1, 576)[: length - s_q + 1 + i])
        assert_close("out", out[0, i], expected, rounded_terms=True)
        assert_close("lse", lse[0, :, i], expected_lse, rounded_terms=row == "sm90")


def test_a_table_of_a_million_pages() -> None:
    cache, table = normal(MILLION, 1, 1, 64), torch.randperm(MILLION, device=CUDA).int()[None]
    q = 2 * normal(1, 1, 16, 64)
    out, lse = dsm.ops.mla_decode(q, cache, table, int32([MILLION - 1]).to(CUDA), 64)
    expected, expected_lse = truth(q[0, 0], cache[table[0, :-1].long(), 0, 0])
    assert_close("out", out[0, 0], expected)
    assert_close("lse", lse[0, :, 0], expected_lse)


@ROWS
@pytest.mark.parametrize(("h_q", "topk"), [(128, 2048), (16, MILLION + 64)])
def test_sparse_decode_of_a_million_tokens(h_q: int, topk: int, row: str) -> None:
    """A list of some rows, and one of all of them."""
    rows = MILLION + 64
    cache = torch.zeros(rows // 64, 64, 1, 656, dtype=torch.uint8, device=CUDA)
    latent = normal(rows, 576)
    dsm.ops.mla_kv_insert(latent[:, :512], latent[:, 512:], cache, torch.arange(rows, device=CUDA))
    indices = torch.randperm(rows, device=CUDA).int()[:topk].view(1, 1, topk)
    q = 2 * normal(1, 1, h_q, 576)
    with forced("sparse_mla_decode", row):
        out, lse = dsm.ops.sparse_mla_decode(q, cache, indices)
    expected, expected_lse = truth(q[0, 0], dsm.ops.kv_gather(cache, indices[0, 0], torch.float32))
    assert_close("out", out[0, 0], expected, rounded_terms=True)
    assert_close("lse", lse[0, :, 0], expected_lse, rounded_terms=row == "sm90")


@ROWS
@pytest.mark.parametrize(("h_q", "d_qk", "topk"), [(128, 576, 2048), (64, 512, 1 << 17)])
def test_prefill_over_a_million_tokens(h_q: int, d_qk: int, topk: int, row: str) -> None:
    kv, q = normal(MILLION, 1, d_qk), 2 * normal(3, h_q, d_qk)
    indices = torch.randint(MILLION, (3, 1, topk), device=CUDA).int()
    with forced("sparse_mla_prefill", row):
        out, top, lse = dsm.ops.sparse_mla_prefill(q, kv, indices)
    for i in range(3):
        keys = kv[indices[i, 0].long(), 0]
        expected, expected_lse = truth(q[i], keys)
        assert_close("out", out[i], expected, rounded_terms=True)
        assert_close("lse", lse[i], expected_lse, rounded_terms=row == "sm90")
        assert_close("max_logits", top[i], (q[i].double() @ keys.double().mT * d_qk**-0.5).amax(-1))
