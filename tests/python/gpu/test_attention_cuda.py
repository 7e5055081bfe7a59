# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Attention over caches on CUDA against the CPU's in float64: every format and shape, hostile lists, lengths, rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cache_layouts import plain, quantised
from hostile import (
    CUDA,
    HALF,
    HOPPER,
    INT_MAX,
    INT_MIN,
    hide_unused,
    int32,
    lists,
    moved,
    pages_of,
    poisoned,
    widened,
)
from torch import Tensor

import ds_flashdmla_moe as dsm
from tolerance import FLOATING, assert_close

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

INF = math.inf


def compare(operator: Any, *inputs: Any, **options: Any) -> tuple[Tensor, ...]:
    """Runs every implementation that takes the call, and the CPU in float64; compares all results."""
    inputs_there, options_there = [*map(moved, inputs)], {name: moved(value) for name, value in options.items()}
    with dsm.explain() as choices:
        on_gpu = operator(*inputs_there, **options_there)
    truths = operator(*map(widened, inputs), **{name: widened(value) for name, value in options.items()})
    runs = {choices[-1].implementation: on_gpu}
    if "sm90" in runs:
        torch.ops.dsm.force_implementation(choices[-1].operator, "cuda")
        try:
            runs["cuda"] = operator(*inputs_there, **options_there)
        finally:
            torch.ops.dsm.force_implementation(choices[-1].operator, "")
    for implementation, results in runs.items():
        for name, result, truth in zip(("first", "second", "third", "fourth"), results, truths, strict=False):
            rounded = implementation == "sm90" or result.dtype in HALF
            assert_close(f"{name} of {implementation}", result.cpu(), truth, rounded_terms=rounded)
    return tuple(result.cpu() for result in on_gpu)


# --- sparse decode ---


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("pad", [0, 16, 576, 3])
@pytest.mark.parametrize(
    ("size", "extra_size"),
    [(656, None), (352, None), (584, None), (528, None), (584, 584), (528, 288), (352, 656), (656, 352), (584, 528)],
)
def test_sparse_decode_of_quantised_caches(size: int, extra_size: int | None, pad: int, dtype: torch.dtype) -> None:
    pool = quantised(size, 9, 8, pad=pad)
    width = pool.values.shape[1]
    options: dict[str, Any] = {}
    if extra_size is not None:
        extra = quantised(extra_size, 30, 2, torch.float8_e4m3fn, pad=pad)
        options = {
            "extra_k_cache": poisoned(extra),
            "extra_indices": lists(3, 2, 45, 60),
            "extra_topk_length": int32([45, 7, INT_MIN]),
        }
    for heads in (3, 16, 40):
        sink = torch.randn(heads, dtype=torch.promote_types(dtype, torch.float32))
        sink[:2] = torch.tensor([INF, -INF])
        compare(
            dsm.ops.sparse_mla_decode,
            torch.randn(3, 2, heads, width).to(dtype),
            poisoned(pool),
            lists(3, 2, 70, 72),
            512 if heads != 3 else 257,
            attn_sink=sink,
            topk_length=int32([INT_MAX, 33, 0]),
            **options,
        )


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("width", [1, 7, 24, 64, 576, 700])
def test_sparse_decode_of_plain_caches(width: int, dtype: torch.dtype) -> None:
    for pad in (0, 8, 1):
        cache = poisoned(plain(width, 5, 8, dtype, pad))
        for heads, topk in ((1, 1), (5, 31), (16, 33), (128, 700)):
            for offset in (1, 2):
                q = torch.randn(2, 2, heads, width + 4).to(dtype)[..., offset : width + offset]
                compare(dsm.ops.sparse_mla_decode, q, cache, lists(2, 2, topk, 40), width)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_caches_in_another_dtype_than_the_queries(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    q, cache = torch.randn(2, 1, 18, 64).to(dtype), torch.randn(5, 8, 1, 64).to(cache_dtype)
    table, lengths = int32([[4, 0], [2, 1]]), int32([15, 9])
    extra = {"extra_k_cache": cache.flip(0), "extra_indices": lists(2, 1, 9, 40)}
    compare(dsm.ops.mla_decode, q, cache, table, lengths, 48)
    compare(dsm.ops.sparse_mla_decode, q, cache, lists(2, 1, 33, 40), 64, **extra)


def test_a_plain_and_a_quantised_cache() -> None:
    for size in (656, 352):
        compare(
            dsm.ops.sparse_mla_decode,
            torch.randn(2, 1, 20, 576).bfloat16(),
            quantised(size, 4, 16).cache,
            lists(2, 1, 50, 64),
            512,
            extra_k_cache=plain(576, 3, 8, torch.bfloat16).cache,
            extra_indices=lists(2, 1, 20, 24),
        )


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_sparse_decode_without_keys(dtype: torch.dtype) -> None:
    q = torch.randn(2, 1, 17, 64).to(dtype)
    cache = plain(64, 3, 4, dtype).cache
    for topk in (0, 5, 3000):
        nothing = torch.full((2, 1, topk), -1, dtype=torch.int32)
        out, lse = compare(
            dsm.ops.sparse_mla_decode, q, cache, nothing, 48, attn_sink=torch.zeros(17).to(lse_of(dtype))
        )
        assert not out.any()
        assert (lse == INF).all()
    compare(dsm.ops.sparse_mla_decode, q, cache[:0], lists(2, 1, 9, 3), 48)


def lse_of(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# --- dense decode ---


@pytest.mark.parametrize("dtype", [*FLOATING, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("page_size", "h_q", "h_kv", "d_qk", "d_v", "s_q"),
    [
        (64, 16, 1, 576, 512, 1),
        (64, 16, 1, 576, 512, 3),
        (1, 6, 3, 24, 16, 2),
        (7, 5, 1, 40, 33, 4),
        (16, 128, 1, 576, 512, 2),
        (128, 2, 2, 64, 64, 70),
        (5, 3, 1, 13, 13, 2),
        (64, 4, 1, 640, 600, 2),
    ],
)
def test_decode(
    dtype: torch.dtype, causal: bool, page_size: int, h_q: int, h_kv: int, d_qk: int, d_v: int, s_q: int
) -> None:
    lengths = [0, 1, 31, 32, 33, 97, 640]
    cache, table = pages_of(len(lengths), page_size, h_kv, d_qk, -(-640 // page_size))
    hide_unused(cache, table, lengths)
    fp8 = dtype == torch.float8_e4m3fn
    q = torch.randn(len(lengths), s_q, h_q, d_qk).to(torch.bfloat16 if fp8 else dtype)
    cache = cache.to(dtype)
    if not fp8:
        compare(dsm.ops.mla_decode, q, cache, table, int32(lengths), d_v, causal=causal)
        return
    scale = torch.tensor([0.7])
    values = cache.double() * scale.double()
    for wide in (torch.float32, torch.float16, torch.bfloat16):
        arguments = (q.to(wide), cache.view(torch.uint8), table, int32(lengths), d_v)
        on_gpu = dsm.ops.mla_decode(*map(moved, arguments), causal=causal, k_scale=moved(scale))
        truth = dsm.ops.mla_decode(q.to(wide).double(), values, *arguments[2:], causal=causal)
        for result, expected in zip(on_gpu, truth, strict=True):
            assert_close("k_scale", result.cpu(), expected, rounded_terms=result.dtype in HALF)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_decode_with_strides(dtype: torch.dtype) -> None:
    memory = torch.full((9, 20, 3, 80), math.nan).to(dtype)
    for columns, entries in ((slice(8, 72), slice(0, 16)), (slice(3, 67), slice(1, 8))):
        cache = memory[:, entries, 1:3, columns]
        cache.copy_(torch.randn(cache.shape))
        table = int32([[8, 0, 3], [5, 1, 2]])
        q = torch.randn(2, 4, 2, 64).to(dtype).transpose(1, 2)
        out = torch.full((2, 2, 4, 50), math.nan, dtype=dtype, device=CUDA)[..., 1:38]
        lengths = int32([17, 9])
        truth, truth_lse = dsm.ops.mla_decode(q.double(), cache.double(), table, lengths, 37, causal=True)
        result, lse = dsm.ops.mla_decode(moved(q), moved(cache), moved(table), moved(lengths), 37, causal=True, out=out)
        assert result is out
        assert_close("out", out.cpu(), truth)
        assert_close("lse", lse.cpu(), truth_lse)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_lengths_and_pages_that_cannot_be_have_no_keys(dtype: torch.dtype) -> None:
    cache, table = torch.randn(4, 8, 1, 64).to(dtype), int32([[0, 1], [-1, 2], [3, 4], [0, 3]])
    q = torch.randn(4, 1, 20, 64).to(dtype)
    out, lse = dsm.ops.mla_decode(*map(moved, (q, cache, table, int32([INT_MAX, 16, 16, -5]))), 64)
    rows = [[*range(16)], [*range(16, 24)], [*range(24, 32)], []]
    indices = torch.full((4, 1, 16), -1, dtype=torch.int32)
    for b, keys in enumerate(rows):
        indices[b, 0, : len(keys)] = int32(keys)
    truth = dsm.ops.sparse_mla_decode(q.double(), cache.double(), indices, 64)
    assert_close("out", out.cpu(), truth[0])
    assert_close("lse", lse.cpu(), truth[1])


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("heads", [3, 16, 32])
def test_a_key_that_is_nan_reaches_only_queries_that_see_it(heads: int, dtype: torch.dtype) -> None:
    for d, d_v, page_size in ((64, 64, 32), (576, 512, 64)):
        cache = torch.randn(2, page_size, 1, d).to(dtype)
        q, table = torch.randn(1, 5, heads, d).to(dtype), int32([[0, 1]])
        for length in (page_size + 2, page_size + 13, 5):
            dirty = cache.clone()
            dirty.view(-1, d)[length - 2 :] = math.nan
            clean = dsm.ops.mla_decode(*map(moved, (q, cache, table, int32([length]))), d_v, causal=True)
            result = dsm.ops.mla_decode(*map(moved, (q, dirty, table, int32([length]))), d_v, causal=True)
            assert torch.equal(clean[0][:, :3], result[0][:, :3])
            assert torch.equal(clean[1][..., :3], result[1][..., :3])
            assert result[0][:, 3:].isnan().all()


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_nan_and_infinite_queries_stay_in_their_rows(dtype: torch.dtype) -> None:
    cache, table, lengths = torch.randn(9, 32, 1, 64).to(dtype), torch.arange(9).int()[None], int32([280])
    q = torch.randn(1, 2, 24, 64).to(dtype)
    clean = dsm.ops.mla_decode(*map(moved, (q, cache, table, lengths)), 64)
    q[0, 1, 5, 3], q[0, 0, 23, 0] = math.nan, INF
    dirty = dsm.ops.mla_decode(*map(moved, (q, cache, table, lengths)), 64)
    same = torch.ones(1, 2, 24, dtype=torch.bool, device=CUDA)
    same[0, 1, 5] = same[0, 0, 23] = False
    assert torch.equal(clean[0][same], dirty[0][same])
    assert torch.equal(clean[1].transpose(1, 2)[same], dirty[1].transpose(1, 2)[same])
    assert dirty[0][0, 1, 5].isnan().all()


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("scale", [0.0, -0.3, 5.0])
def test_scores_of_any_size(scale: float, dtype: torch.dtype) -> None:
    """Large ones leave one weight, negative scales turn the order, equal ones average 20000 keys."""
    keys = 20000 if scale == 0 else 700
    cache = torch.randn(1, keys, 1, 64).to(dtype)
    q = torch.randn(2, 1, 18, 64).to(dtype)
    compare(dsm.ops.mla_decode, q, cache, int32([[0], [0]]), int32([keys, keys - 1]), 64, softmax_scale=scale)


# --- prefill ---


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize(
    ("s_q", "h_q", "h_kv", "d_qk", "d_v", "topk"),
    [(3, 16, 1, 576, 512, 100), (2, 128, 1, 576, 512, 65), (4, 6, 2, 24, 16, 33), (5, 3, 3, 13, 7, 9),
     (70, 64, 1, 512, 512, 40), (1, 16, 1, 64, 64, 5000), (2, 5, 1, 700, 700, 12), (3, 2, 1, 8, 8, 0)],
)  # fmt: skip
@pytest.mark.parametrize("with_sink", [False, True])
def test_prefill(
    s_q: int, h_q: int, h_kv: int, d_qk: int, d_v: int, topk: int, with_sink: bool, dtype: torch.dtype
) -> None:
    s_kv = 90
    kv = torch.randn(s_kv, h_kv, d_qk).to(dtype)
    kv[-2:] = math.nan
    indices = lists(s_q, h_kv, topk, s_kv)
    sink = torch.randn(h_q, dtype=lse_of(dtype))
    sink[:2] = torch.tensor([INF, -INF])
    lengths = torch.arange(s_q).int() * 37 % (topk + 2) - 1
    compare(
        dsm.ops.sparse_mla_prefill,
        torch.randn(s_q, h_q, d_qk).to(dtype),
        kv,
        indices,
        d_v=d_v,
        attn_sink=sink if with_sink else None,
        topk_length=lengths if with_sink else None,
        return_key_probs=True,
    )


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_prefill_with_strides(dtype: torch.dtype) -> None:
    q = torch.randn(4, 8, 3, 64).to(dtype)[:, :, 1]
    for width in (64, 65):
        kv = torch.randn(30, 2, width).to(dtype)[:, :1, -64:]
        compare(dsm.ops.sparse_mla_prefill, q, kv, lists(4, 1, 20, 32), d_v=40, return_key_probs=True)


# --- all of them ---


def test_offsets_beyond_two_to_the_31() -> None:
    if torch.cuda.mem_get_info(CUDA)[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    rows = 2**31 // 512 + 200
    memory = torch.zeros(rows, 512, device=CUDA, dtype=torch.bfloat16)
    memory[-100:] = torch.randn(100, 512, device=CUDA)
    near = memory[-100:].clone()
    q = torch.randn(2, 1, 16, 512, device=CUDA).bfloat16()
    far = torch.arange(rows - 100, rows, device=CUDA).int().expand(2, 1, 100)
    close = torch.arange(100, device=CUDA).int().expand(2, 1, 100)
    expected = dsm.ops.sparse_mla_decode(q, near[None, :, None], close)
    for pages in (memory[None, :, None], memory[:, None, None]):
        assert torch.equal(dsm.ops.sparse_mla_decode(q, pages, far)[0], expected[0])
        wide = dsm.ops.sparse_mla_decode(q.float(), near.float()[None, :, None], close)
        assert_close("far", expected[0], wide[0].double(), rounded_terms=HOPPER)
    assert torch.equal(
        dsm.ops.sparse_mla_prefill(q[:, 0], memory[:, None], far)[0],
        dsm.ops.sparse_mla_prefill(q[:, 0], near[:, None], close)[0],
    )
    table = torch.arange(rows - 100, rows, device=CUDA).int().expand(2, 100)
    lengths = torch.full((2,), 100, dtype=torch.int32, device=CUDA)
    decoded = dsm.ops.mla_decode(q, memory[:, None, None], table, lengths, 512)
    assert_close("decoded", decoded[0], wide[0].double())


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_graph_replays_with_changed_lengths_and_lists(dtype: torch.dtype) -> None:
    batch, keys = 3, 4096
    q, cache = torch.randn(batch, 1, 16, 64).to(dtype).to(CUDA), torch.randn(200, 64, 1, 64).to(dtype).to(CUDA)
    table, lengths = torch.zeros(batch, keys // 64, dtype=torch.int32, device=CUDA), torch.zeros(batch).int().to(CUDA)
    indices, topk_length = torch.zeros(batch, 1, 700, dtype=torch.int32, device=CUDA), lengths.clone()

    def run() -> tuple[Tensor, ...]:
        dense = dsm.ops.mla_decode(q, cache, table, lengths, 64)
        sparse = dsm.ops.sparse_mla_decode(q, cache, indices, 64, topk_length=topk_length)
        prefill = dsm.ops.sparse_mla_prefill(
            q[:, 0], cache.view(-1, 1, 64), indices, topk_length=topk_length, d_v=64, return_key_probs=True
        )
        return (*dense, *sparse, *prefill)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        table.copy_(torch.randint(200, table.shape))
        lengths.copy_(torch.randint(keys + 1, lengths.shape))
        indices.copy_(torch.randint(-9, 200 * 64 + 9, indices.shape))
        topk_length.copy_(torch.randint(800, lengths.shape))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(*pair) for pair in zip(run(), captured, strict=True))
