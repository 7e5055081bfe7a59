# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from cache_layouts import BYTE_TYPES, FORMATS, Pool, plain, poison, quantised
from mla_truth import attend_all
from torch import Tensor

import ds_flashdmla_moe as dsm
from threads import assert_same_bits
from tolerance import FLOATING, assert_close

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
SINKS = [None, 0.5, math.inf, -math.inf]


def int32(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def lists(batch: int, s_q: int, topk: int, rows: int) -> Tensor:
    """Random rows, some twice, among indices that are none."""
    indices = torch.randint(0, max(rows, 1), (batch, s_q, topk), dtype=torch.int32)
    hostile = int32([-1, INT_MIN, INT_MAX, rows, rows + 1, -rows - 1])
    return torch.where(torch.rand(indices.shape) < 0.3, hostile[torch.randint(6, indices.shape)], indices)


def check(
    q: Tensor,
    pool: Pool,
    indices: Tensor,
    d_v: int,
    extra: Pool | None = None,
    extra_indices: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    out, lse = dsm.ops.sparse_mla_decode(
        q, pool.cache, indices, d_v, extra_k_cache=extra and extra.cache, extra_indices=extra_indices, **options
    )

    def listed(of: Pool, given: Tensor, length: Tensor | None, b: int, i: int) -> Tensor:
        topk = given.shape[-1]
        count = topk if length is None else min(max(int(length[b]), 0), topk)
        return of.values[[j for j in given[b, i, :count].tolist() if 0 <= j < len(of.values)]]

    def keys_of(b: int, i: int, h: int) -> Tensor:
        keys = listed(pool, indices, options.get("topk_length"), b, i)
        if extra is None or extra_indices is None:
            return keys
        return torch.cat((keys, listed(extra, extra_indices, options.get("extra_topk_length"), b, i)))

    scale = options.get("softmax_scale", q.shape[-1] ** -0.5)
    expected, expected_lse = attend_all(q, keys_of, d_v, scale, options.get("attn_sink"))
    assert out.dtype == q.dtype
    assert_close("out", out, expected)
    assert_close("lse", lse, expected_lse)
    return out, lse


def sink_of(value: float | None, h_q: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
    return None if value is None else torch.full((h_q,), value, dtype=dtype)


@pytest.mark.parametrize("sink", SINKS, ids=str)
@pytest.mark.parametrize("page_size", [1, 2, 3, 64])
@pytest.mark.parametrize("row_bytes", [656, 352, 584, 528])
def test_quantised_caches(row_bytes: int, page_size: int, sink: float | None) -> None:
    """Each format alone, and with a second pool of each format of its width and a plain one."""
    width, (batch, s_q, h_q, topk) = FORMATS[row_bytes], (2, 2, 3, 6)
    d_v = 512
    q = torch.randn(batch, s_q, h_q, width).bfloat16()
    pool = quantised(row_bytes, 5, page_size, pad=(-page_size * row_bytes) % 576)
    indices = lists(batch, s_q, topk, len(pool.values))
    check(q, pool, indices, d_v, attn_sink=sink_of(sink, h_q))
    extras = [quantised(b, 3, 2, BYTE_TYPES[b % 3], pad=8) for b, w in FORMATS.items() if w == width]
    for extra in [*extras, plain(width, 3, 2, torch.bfloat16)]:
        check(
            q,
            pool,
            indices,
            d_v,
            extra,
            lists(batch, s_q, 4, 6),
            attn_sink=sink_of(sink, h_q),
            topk_length=int32([0, 1]),
            extra_topk_length=int32([1, 4]),
        )


@pytest.mark.parametrize("dtype", BYTE_TYPES, ids=str)
@pytest.mark.parametrize("q_dtype", FLOATING, ids=str)
def test_dtypes_of_queries_and_of_bytes(q_dtype: torch.dtype, dtype: torch.dtype) -> None:
    pool = quantised(584, 3, 4, dtype, pad=40)
    check(torch.randn(1, 2, 2, 512).to(q_dtype), pool, lists(1, 2, 9, 12), 512)


@pytest.mark.parametrize("sink", SINKS, ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_plain_caches(dtype: torch.dtype, sink: float | None) -> None:
    q = torch.randn(2, 3, 5, 24).to(dtype)
    pool, extra = plain(24, 4, 3, dtype, pad=5), plain(24, 9, 1, dtype)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    sinks = sink_of(sink, 5, statistics)
    indices, more = lists(2, 3, 7, 12), lists(2, 3, 11, 9)
    for d_v in (0, 1, 16, 24):
        check(q, pool, indices, d_v, attn_sink=sinks)
    for length, extra_length in ([0, 7], [11, 0]), ([1, 1], None), (None, [1, 0]), ([INT_MIN, INT_MAX], [-1, 12]):
        check(
            q,
            pool,
            indices,
            16,
            extra,
            more,
            attn_sink=sinks,
            topk_length=None if length is None else int32(length),
            extra_topk_length=None if extra_length is None else int32(extra_length),
            softmax_scale=0.7,
        )


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("q_dtype", FLOATING, ids=str)
def test_plain_caches_may_have_other_dtypes(q_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """What counts is their numbers, in the dtype computed in."""
    q, pool, extra = torch.randn(2, 2, 3, 24).to(q_dtype), plain(24, 4, 3, dtype), plain(24, 9, 1, torch.bfloat16)
    indices, more = lists(2, 2, 7, 12), lists(2, 2, 5, 9)
    if dtype == torch.float64 != q_dtype:
        with pytest.raises(ValueError, match="k_cache must be quantised, float32, float16 or bfloat16 beside q in"):
            check(q, pool, indices, 16)
        return
    results = check(q, pool, indices, 16, extra, more)
    wide = torch.promote_types(q_dtype, torch.float32)
    same = dsm.ops.sparse_mla_decode(
        q, pool.cache.to(wide), indices, 16, extra_k_cache=extra.cache.to(wide), extra_indices=more
    )
    assert all(torch.equal(a, b) for a, b in zip(results, same, strict=True))


def test_golden_sink() -> None:
    """Scores (1, 2) and sink 0.5 weigh 0.2312239 and 0.6285317."""
    cache = torch.tensor([[1.0, 1.0, 0.0], [2.0, 0.0, 1.0]]).reshape(2, 1, 1, 3)[..., [1, 2, 0]]
    q = torch.tensor([0.0, 0.0, 1.0]).reshape(1, 1, 1, 3)
    out, lse = dsm.ops.sparse_mla_decode(
        q, cache, int32([[[0, 1]]]), 2, softmax_scale=1.0, attn_sink=torch.tensor([0.5])
    )
    torch.testing.assert_close(out.flatten(), torch.tensor([0.2312239, 0.6285317]), rtol=0, atol=1e-7)
    torch.testing.assert_close(lse.item(), math.log(math.e + math.e**2), rtol=1e-7, atol=0)


def test_a_query_without_keys() -> None:
    q, pool = torch.randn(2, 2, 3, 8), plain(8, 2, 2, torch.float32)
    indices = int32([[[0, 1], [-1, 4]], [[0, 1], [2, 3]]])
    for sink in SINKS:
        out, lse = check(q, pool, indices, 8, topk_length=int32([2, 0]), attn_sink=sink_of(sink, 3))
        assert not out[0, 1].any()
        assert not out[1].any()
        assert (lse[0, :, 1] == math.inf).all()
        assert (lse[1] == math.inf).all()
    for empty in (plain(8, 0, 2, torch.float32), plain(8, 2, 0, torch.float32)):
        out, lse = check(q, empty, indices, 8)
        assert not out.any()
        assert (lse == math.inf).all()
    assert not check(q, pool, indices[..., :0], 8)[0].any()


@pytest.mark.parametrize("row_bytes", [*FORMATS, None], ids=str)
def test_unlisted_rows_are_not_read(row_bytes: int | None) -> None:
    width = FORMATS.get(row_bytes or 0, 512)
    pool = quantised(row_bytes, 3, 4, pad=3) if row_bytes else plain(512, 3, 4, torch.float32)
    for row in (0, 3, 7, 11):
        poison(pool, row)
    first = plain(width, 1, 1, torch.float32)
    # The poisoned rows stand beyond the length only.
    listed = int32([[[4, 1, 10, 1, 0, 3, 7, 11]]])
    q = torch.randn(1, 1, 2, width)
    out, lse = check(q, first, int32([[[0]]]), 512, pool, listed, extra_topk_length=int32([4]))
    assert out.isfinite().all()
    assert lse.isfinite().all()


def test_two_pools_are_one_softmax() -> None:
    q, pool = torch.randn(1, 2, 4, 16), plain(16, 10, 1, torch.float32)
    indices = torch.stack([torch.randperm(10)[:8] for _ in range(2)])[None].int()
    whole = dsm.ops.sparse_mla_decode(q, pool.cache, indices, 8)
    split = dsm.ops.sparse_mla_decode(
        q, pool.cache, indices[..., :3], 8, extra_k_cache=pool.cache, extra_indices=indices[..., 3:]
    )
    assert all(torch.equal(a, b) for a, b in zip(whole, split, strict=True))


def test_all_rows_in_order_are_dense_decoding() -> None:
    q, pool = torch.randn(2, 1, 4, 16), plain(16, 40, 5, torch.float32)
    table = torch.randperm(40)[:20].reshape(2, 10).int()
    indices = (table[..., None] * 5 + torch.arange(5)).flatten(1)[:, None].int()
    dense = dsm.ops.mla_decode(q, pool.cache, table, int32([50, 50]), 16)
    sparse = dsm.ops.sparse_mla_decode(q, pool.cache, indices, 16)
    assert all(torch.equal(a, b) for a, b in zip(dense, sparse, strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_fuzz(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype = rng.choice(FLOATING)
    width = rng.choice([512, 576, rng.randint(1, 40)])

    def draw_pool(second: bool) -> Pool:
        pages, page_size, pad = rng.randint(0, 6), rng.choice([1, 2, 3, 64]), rng.choice([0, 5, 64])
        formats = [b for b, w in FORMATS.items() if w == width and (second or b != 288)]
        row_bytes = rng.choice([None, *formats])
        if row_bytes is None:
            return plain(width, pages, page_size, dtype, pad)
        return quantised(row_bytes, pages, page_size, rng.choice(BYTE_TYPES), pad)

    batch, s_q, h_q = rng.choice([1, 2, 3]), rng.choice([1, 2]), rng.choice([1, 3, 8])
    lengths = [-1, 0, 1, 5, 70, 200]
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    pool, extra = draw_pool(False), draw_pool(True) if rng.random() < 0.6 else None
    options: dict[str, Any] = {}
    if rng.random() < 0.5:
        options["attn_sink"] = torch.tensor([rng.choice([-3, 0, 4, math.inf, -math.inf]) for _ in range(h_q)]).to(
            statistics
        )
    if rng.random() < 0.5:
        options["topk_length"] = int32([rng.choice(lengths) for _ in range(batch)])
    if extra is not None and rng.random() < 0.5:
        options["extra_topk_length"] = int32([rng.choice(lengths) for _ in range(batch)])
    topk, extra_topk = rng.choice([0, 1, 5, 64, 200]), rng.choice([0, 1, 5, 64])
    print(seed, dtype, width, pool.cache.shape, extra and extra.cache.shape, batch, s_q, h_q, topk, extra_topk, options)
    check(
        torch.randn(batch, s_q, h_q, width).to(dtype),
        pool,
        lists(batch, s_q, topk, len(pool.values)),
        rng.randint(0, width),
        extra,
        None if extra is None else lists(batch, s_q, extra_topk, len(extra.values)),
        **options,
    )


def test_views_are_read_in_place() -> None:
    q, pool = torch.randn(2, 3, 4, 16), plain(16, 6, 2, torch.float32)
    indices = lists(2, 3, 5, 12)
    expected = dsm.ops.sparse_mla_decode(q, pool.cache, indices, 8)
    wide_q, wide_indices = torch.full((2, 3, 4, 20), torch.nan), torch.zeros(3, 2, 9, dtype=torch.int32)
    wide_q[..., :16], wide_indices[..., 2:7] = q, indices.transpose(0, 1)
    for result, truth in zip(
        dsm.ops.sparse_mla_decode(wide_q[..., :16], pool.cache, wide_indices.transpose(0, 1)[..., 2:7], 8),
        expected,
        strict=True,
    ):
        assert torch.equal(result, truth)
    for result, truth in zip(
        dsm.ops.sparse_mla_decode(
            torch.stack((q, q), -1)[..., 1], pool.cache, torch.stack((indices, indices), -1)[..., 0], 8
        ),
        expected,
        strict=True,
    ):
        assert torch.equal(result, truth)


def test_a_given_output_is_written_in_place() -> None:
    q, pool = torch.randn(2, 3, 4, 16), plain(16, 6, 2, torch.float32)
    indices = lists(2, 3, 5, 12)
    expected, expected_lse = dsm.ops.sparse_mla_decode(q, pool.cache, indices, 8)
    memory = torch.full((3, 2, 4, 10), torch.nan)
    out = memory.transpose(0, 1)[..., 1:9]
    result, lse = dsm.ops.sparse_mla_decode(q, pool.cache, indices, 8, out=out)
    assert result is out
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    assert memory[..., [0, 9]].isnan().all()
    for wrong in (out[..., :7], out[:1], out.double()):
        with pytest.raises(ValueError, match="out must be"):
            dsm.ops.sparse_mla_decode(q, pool.cache, indices, 8, out=wrong)


def test_pages_beyond_two_gigabytes() -> None:
    pool = quantised(528, 2, 1)
    far = torch.empty(2**31 + 528, dtype=torch.uint8).as_strided((2, 1, 1, 528), (2**31, 528, 528, 1))
    far.copy_(pool.cache)  # the memory between the two is never touched
    q, indices, table = torch.randn(1, 1, 2, 512), int32([[[1, 0, 1]]]), int32([[1, 0]])
    check(q, Pool(far, pool.values), indices, 512)
    dense_q = torch.randn(1, 1, 2, 528)
    finite = pool.cache.view(torch.float8_e4m3fn).float().nan_to_num().to(torch.float8_e4m3fn)
    far.copy_(finite.view(torch.uint8))
    near = dsm.ops.mla_decode(dense_q, finite, table, int32([2]), 512)
    for result, truth in zip(dsm.ops.mla_decode(dense_q, far, table, int32([2]), 512), near, strict=True):
        assert torch.equal(result, truth)


@pytest.mark.parametrize(("batch", "topk"), [(1, 2500), (7, 40)])
def test_same_bits_for_any_number_of_threads_and_batch(batch: int, topk: int) -> None:
    q, pool = torch.randn(batch, 1, 4, 16), plain(16, 100, 3, torch.float32)
    indices = lists(batch, 1, topk, 300)
    assert_same_bits(lambda: dsm.ops.sparse_mla_decode(q, pool.cache, indices, 8))
    out, lse = dsm.ops.sparse_mla_decode(q, pool.cache, indices, 8)
    alone, lse_alone = dsm.ops.sparse_mla_decode(q[-1:], pool.cache, indices[-1:], 8)
    assert torch.equal(alone[0], out[-1])
    assert torch.equal(lse_alone[0], lse[-1])


CACHE = torch.zeros(3, 2, 1, 512)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 512)}, r"q must be \[batch, s_q, h_q, d_qk\]"),
        ({"k_cache": CACHE.double()}, "k_cache must be quantised, float32, float16 or bfloat16 .*, got float64"),
        ({"k_cache": CACHE.int()}, r"k_cache must be \[pages, page_size, 1, width\] .*, got .* int32"),
        ({"q": torch.zeros(2, 1, 4, 576)}, "k_cache must be of rows of d_qk = 576 values, got 512"),
        ({"k_cache": torch.zeros(3, 2, 2, 512)}, r"k_cache must be \[pages, page_size, 1, width\]"),
        ({"k_cache": torch.zeros(3, 2, 1, 585).byte()}, r"k_cache must be .* 656\|352\|584\|528"),
        ({"k_cache": torch.zeros(3, 2, 1, 288).byte()}, r"k_cache must be .* 656\|352\|584\|528\] .* 288"),
        ({"k_cache": torch.zeros(3, 2, 1, 656).byte()}, "k_cache must be of rows of d_qk = 512 values, got 576"),
        ({"k_cache": torch.zeros(3, 4, 1, 512)[:, ::2]}, "k_cache must be without gaps inside a page"),
        ({"indices": torch.zeros(2, 1, 3)}, "indices must be .* int32, got .* float32"),
        ({"indices": torch.zeros(2, 2, 3).int()}, r"indices must be \[batch, s_q, topk\]"),
        ({"topk_length": torch.zeros(3).int()}, r"topk_length must be \[batch\]"),
        ({"extra_k_cache": CACHE}, r"extra_indices must be \[batch, s_q, topk\] .* got nothing"),
        ({"extra_indices": torch.zeros(2, 1, 3).int()}, "extra_indices must be given exactly when"),
        ({"extra_topk_length": torch.zeros(2).int()}, "extra_topk_length must be absent"),
        ({"attn_sink": torch.zeros(3)}, r"attn_sink must be \[h_q\]"),
        ({"attn_sink": torch.zeros(4).double()}, "attn_sink must be .* float32, got .* float64"),
        ({"d_v": 513}, "d_v must be at most d_qk = 512, got 513"),
        ({"softmax_scale": math.inf}, "softmax_scale must be finite"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    inputs: dict[str, Any] = {"q": torch.zeros(2, 1, 4, 512), "k_cache": CACHE, "indices": torch.zeros(2, 1, 3).int()}
    dsm.ops.sparse_mla_decode(**inputs)
    with pytest.raises(ValueError, match=message):
        dsm.ops.sparse_mla_decode(**{**inputs, **change})


def test_differentiation_is_refused() -> None:
    q, pool, indices = torch.randn(1, 1, 2, 8), plain(8, 2, 2, torch.float32), int32([[[0, 3]]])
    sink, out = torch.zeros(2, requires_grad=True), torch.empty(1, 1, 2, 4)
    with pytest.raises(NotImplementedError, match="sparse_mla_decode has no gradient"):
        dsm.ops.sparse_mla_decode(q, pool.cache, indices, 4, attn_sink=sink)[0].sum().backward()
    for given in (
        {"attn_sink": sink},
        {"extra_k_cache": pool.cache.clone().requires_grad_(), "extra_indices": indices},
    ):
        with pytest.raises(ValueError, match="sparse_mla_decode: out must be None where gradients are recorded"):
            dsm.ops.sparse_mla_decode(q, pool.cache, indices, 4, out=out, **given)
        with torch.no_grad():
            assert dsm.ops.sparse_mla_decode(q, pool.cache, indices, 4, out=out, **given)[0] is out


def test_opcheck_and_compile() -> None:
    q, pool, extra = torch.randn(2, 1, 2, 512).bfloat16(), quantised(528, 3, 2), quantised(288, 3, 2)
    indices, more, length = lists(2, 1, 5, 6), lists(2, 1, 3, 6), int32([2, 3])
    sink = torch.zeros(2)
    arguments = (q, pool.cache, indices, length, extra.cache, more, length, sink, 0.1, False)
    torch.library.opcheck(torch.ops.dsm.sparse_mla_decode.default, (*arguments, 512))
    out = torch.empty(2, 1, 2, 512, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.dsm.sparse_mla_decode_out.default, (*arguments, out))

    def f(q: Tensor, cache: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        return dsm.ops.sparse_mla_decode(q, cache, indices, attn_sink=sink, topk_length=length)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(q, pool.cache, indices), f(q, pool.cache, indices), strict=True):
        assert torch.equal(a, b)
