# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The Hopper kernel of sparse_mla_decode against the formula in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from cache_layouts import FORMATS, Pool, decode, of_rows, poison, quantised
from calls import forced
from hostile import HOPPER, INT_MAX, INT_MIN
from torch import Tensor

import ds_flashdmla_moe as dsm
from tolerance import assert_close

pytestmark = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")

BFLOAT16 = (1152, 1024)  # bytes of plain rows, which it takes for 16 heads or more


def lists(batch: int, s_q: int, topk: int, rows: int, hostile: float = 0.0) -> Tensor:
    indices = torch.randint(0, rows, (batch, s_q, topk), dtype=torch.int32)
    bad = torch.tensor([-1, INT_MIN, INT_MAX, rows, rows + 1, -rows - 1], dtype=torch.int32)
    return torch.where(torch.rand(indices.shape) < hostile, bad[torch.randint(6, indices.shape)], indices)


class Listed(NamedTuple):
    """A cache, lists ``[batch, s_q, topk]`` of its rows, and how much of them counts, all if not given."""

    pool: Pool
    indices: Tensor
    lengths: list[int] | None = None

    def cache(self) -> Tensor:
        """On the GPU with the same strides, and the same bytes between the pages."""
        cache = self.pool.cache
        memory = torch.empty(0, dtype=cache.dtype).set_(cache.untyped_storage())  # type: ignore[call-overload]
        return memory.cuda().as_strided(cache.shape, cache.stride(), cache.storage_offset())

    def counts(self) -> Tensor | None:
        return None if self.lengths is None else torch.tensor(self.lengths, dtype=torch.int32).cuda()

    def keys(self) -> tuple[Tensor, Tensor]:
        """``[batch, s_q, topk, width]`` float64, and which of them are seen: the others are row 0."""
        seen = (self.indices >= 0) & (self.indices < len(self.pool.values))
        if self.lengths is not None:
            seen &= torch.arange(self.indices.shape[-1]) < torch.tensor(self.lengths)[:, None, None]
        seen = seen.cuda()
        return self.pool.values.cuda()[self.indices.cuda().long().where(seen, 0)], seen


def truth(q: Tensor, caches: list[Listed], scale: float, sink: Tensor | None) -> tuple[Tensor, Tensor]:
    """The formula in float64, for q ``[batch, s_q, h_q, width]``."""
    keys, seen = (torch.cat(parts, 2) for parts in zip(*(listed.keys() for listed in caches), strict=True))
    scores = torch.einsum("bihd,bijd->bihj", q.double(), keys) * scale
    scores.masked_fill_(~seen[:, :, None], -math.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - lse).exp()
    if sink is not None:
        weights *= (lse - sink[:, None].double()).sigmoid()
    weights = weights.where(lse > -math.inf, 0)
    lse = lse.where(lse > -math.inf, math.inf).squeeze(-1).mT
    return torch.einsum("bihj,bijd->bihd", weights, keys[..., :512]), lse


def check(
    h_q: int,
    pool: Pool,
    indices: Tensor,
    lengths: list[int] | None = None,
    extra: Pool | None = None,
    extra_indices: Tensor | None = None,
    extra_lengths: list[int] | None = None,
    sink: float | None = None,
    batch_invariant: bool = False,
) -> None:
    batch, s_q, _ = indices.shape
    width = pool.values.shape[1]
    scale = width**-0.5 / 4
    q = torch.randn(batch, s_q, h_q, width).bfloat16().cuda()
    attn_sink = None if sink is None else torch.full((h_q,), sink).cuda()
    caches = [Listed(pool, indices, lengths)]
    options: dict[str, Tensor | None] = {}
    if extra is not None and extra_indices is not None:
        caches.append(second := Listed(extra, extra_indices, extra_lengths))
        options = {
            "extra_k_cache": second.cache(),
            "extra_indices": extra_indices.cuda(),
            "extra_topk_length": second.counts(),
        }

    def call() -> tuple[Tensor, Tensor]:
        with forced("sparse_mla_decode", "sm90"):
            return dsm.ops.sparse_mla_decode(
                q,
                caches[0].cache(),
                indices.cuda(),
                softmax_scale=scale,
                attn_sink=attn_sink,
                topk_length=caches[0].counts(),
                batch_invariant=batch_invariant,
                **options,
            )

    out, lse = call()
    expected, expected_lse = truth(q, caches, scale, attn_sink)
    assert_close("out", out, expected, rounded_terms=True)
    # Of the other formats bfloat16 holds all values.
    assert_close("lse", lse, expected_lse, rounded_terms=pool.cache.shape[-1] == 656)
    again, lse_again = call()
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)


@pytest.mark.parametrize("page_size", [1, 2, 64])
@pytest.mark.parametrize("row_bytes", [656, 352, 584, 528, *BFLOAT16])
def test_formats(row_bytes: int, page_size: int) -> None:
    """A cache alone, and with a second one, padded pages and indices that are no rows."""
    pool = of_rows(row_bytes, 320 // page_size, page_size, -page_size * row_bytes % 16 + 16)
    check(64, pool, lists(3, 1, 150, 320))
    check(64, pool, lists(12, 1, 150, 320))
    check(16, pool, lists(3, 1, 150, 320))
    for extra_bytes in (row_bytes, 288) if row_bytes == 528 else (row_bytes,):
        extra = of_rows(extra_bytes, 100, 2, -2 * extra_bytes % 16)
        check(
            17 if row_bytes in BFLOAT16 else 5,
            pool,
            lists(2, 2, 65, 320, 0.3),
            [64, 1],
            extra,
            lists(2, 2, 70, 200, 0.3),
            [70, 66],
            sink=0.5,
        )


@pytest.mark.parametrize("h_q", [1, 11, 16])
def test_few_heads_of_v32(h_q: int) -> None:
    """They have a kernel for thread blocks with much to do, and for all where bits may not depend on the batch."""
    pool, extra = of_rows(656, 10, 32, 16), of_rows(656, 100, 2)
    indices, extra_indices = lists(4, 2, 150, 320, 0.3), lists(4, 2, 70, 200, 0.3)
    check(h_q, pool, indices, [150, 1, 0, 65], extra, extra_indices, [70, 66, 0, 0], sink=0.5, batch_invariant=True)
    check(h_q, pool, torch.full((2, 1, 200), -1, dtype=torch.int32), batch_invariant=True)
    lengths = torch.randint(-2, 2200, (40,)).tolist()
    check(h_q, pool, lists(40, 1, 2048, 320, 0.1), lengths, extra, lists(40, 1, 129, 200), lengths[::-1])


def test_few_heads_of_v32_keep_to_themselves() -> None:
    """Queries 2^20 times as large as others', NaN or infinite are those of their own heads."""
    pool, indices = of_rows(656, 8, 64), lists(3, 1, 200, 512)
    q = torch.randn(3, 1, 16, 576).bfloat16()
    q[:, :, 1::2] *= 2.0**20
    q[1, 0, 3, 7], q[1, 0, 5, 570] = math.nan, math.inf
    with forced("sparse_mla_decode", "sm90"):
        out, lse = dsm.ops.sparse_mla_decode(
            q.cuda(), pool.cache.cuda(), indices.cuda(), softmax_scale=0.02, batch_invariant=True
        )
    expected, expected_lse = truth(q[:, :, ::2].cuda(), [Listed(pool, indices)], 0.02, None)
    assert_close("out", out[:, :, ::2], expected, rounded_terms=True)
    assert_close("lse", lse[:, ::2], expected_lse, rounded_terms=True)
    spoilt = out.isnan().any(-1)[:, 0]
    assert spoilt[1, 3]
    assert spoilt[1, 5]
    assert spoilt.sum() == 2


def test_scores_of_minus_infinity_of_v32() -> None:
    """They are no keys: alone in a request's first blocks, they do not set what later weights are measured by."""
    pool, indices = of_rows(656, 8, 64), lists(2, 1, 300, 512)
    tails = pool.cache.view(-1, 656)[:, 528:].view(torch.bfloat16)
    tails[:, 62], tails[5, 63] = 64, -math.inf
    pool.values[:, 574], pool.values[5, 575] = 64, -math.inf
    indices[indices == 5] = 6
    indices[:, :, :130] = -1
    indices[:, :, 17] = 5
    q = 0.05 * torch.randn(2, 1, 16, 576).bfloat16()
    q[..., 574], q[..., 575] = -1, 1  # all other scores are about -64
    scale = 1.0
    with forced("sparse_mla_decode", "sm90"):
        out, lse = dsm.ops.sparse_mla_decode(
            q.cuda(), pool.cache.cuda(), indices.cuda(), softmax_scale=scale, batch_invariant=True
        )
    expected, expected_lse = truth(q.cuda(), [Listed(pool, indices)], scale, None)
    assert_close("out", out, expected, rounded_terms=True)
    assert_close("lse", lse, expected_lse, rounded_terms=True)


@pytest.mark.parametrize("least", [-4, -30])
def test_scales_of_v32_far_apart(least: int) -> None:
    """Rows whose values are up to 2^30 times as large as others', each in a request without and with larger ones."""
    rows = quantised(656, 8, 64).cache.view(-1, 656)
    rows[:, 512:528].view(torch.float32).mul_(2.0 ** torch.randint(-40, least, (512, 1)))
    rows[::7, 512:528].view(torch.float32).mul_(2.0**30)
    pool = Pool(rows.view(8, 64, 1, 656), decode(rows.view(8, -1), 64, 656))
    indices = lists(6, 1, 200, 512)
    indices[:3] += (indices[:3] % 7 == 0).int()  # none of the large rows, but for number 511
    check(16, pool, indices[:3].clamp(max=510), batch_invariant=True)
    check(16, pool, indices, batch_invariant=True)


@pytest.mark.parametrize(
    ("row_bytes", "h_q"),
    [
        (row_bytes, h_q)
        for row_bytes in (584, 1152)
        for h_q in (1, 8, 16, 17, 63, 64, 65, 128)
        if row_bytes < 1024 or h_q > 8
    ],
)
def test_heads(row_bytes: int, h_q: int) -> None:
    """In tiles of 16 heads where requests are few, and in tiles of 64."""
    pool = of_rows(row_bytes, 4, 64)
    for batch in (2, 8):
        check(h_q, pool, lists(batch, 3, 129, 256), sink=-1.0)


@pytest.mark.parametrize("row_bytes", [584, 1024])
@pytest.mark.parametrize("batch", [1, 7, 132, 150, 300])
def test_requests_of_all_lengths(batch: int, row_bytes: int) -> None:
    """Requests split between thread blocks and several in one of them; among them some without a key."""
    pool, extra = of_rows(row_bytes, 4, 64), of_rows(row_bytes, 80, 2)
    lengths = torch.randint(-2, 140, (batch,)).tolist()
    extra_lengths = [0 if length < 1 else int(torch.randint(0, 300, ())) for length in lengths]
    check(16, pool, lists(batch, 1, 128, 256), lengths, extra, lists(batch, 1, 256, 160), extra_lengths, sink=0.1)


@pytest.mark.parametrize("row_bytes", [656, 1152])
@pytest.mark.parametrize("sink", [math.inf, -math.inf])
def test_nothing_reads_what_no_list_names(sink: float, row_bytes: int) -> None:
    pool = of_rows(row_bytes, 8, 16)
    indices = lists(4, 1, 90, 128)
    indices[indices == 17] = 18
    indices[1:3, :, 40:] = 17
    poison(pool, 17)
    for batch_invariant in (False, True):  # tiles of 16 heads and of 64
        check(24, pool, indices, [90, 40, 40, 0], sink=sink, batch_invariant=batch_invariant)
    check(24, pool, torch.full((2, 1, 70), -1, dtype=torch.int32))


@pytest.mark.parametrize("row_bytes", [584, 528])
def test_e8m0_nan_scale(row_bytes: int) -> None:
    """A scale of code 255 is NaN: so are the requests that list the row, and only these."""
    pool = quantised(row_bytes, 2, 64)
    pool.cache[0].view(-1)[64 * 576 + 5 * 8 + 2 if row_bytes == 584 else 5 * 528 + 512 + 2] = 255
    indices = torch.randint(6, 128, (3, 1, 70), dtype=torch.int32)
    indices[1, 0, 66] = 5
    q = torch.randn(3, 1, 7, 512).bfloat16().cuda()
    out, lse = dsm.ops.sparse_mla_decode(q, pool.cache.cuda(), indices.cuda(), softmax_scale=0.02)
    assert out[1].isnan().all()
    assert lse[1].isnan().all()
    assert out[::2].isfinite().all()
    assert lse[::2].isfinite().all()


@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (0, 1), (63, 64), (64, 65), (65, 63), (128, 129)])
def test_lengths_around_blocks(counts: tuple[int, int]) -> None:
    first, second = counts
    for row_bytes, extra_bytes in ((528, 288), (1024, 1024)):
        pool, extra = of_rows(row_bytes, 4, 64), of_rows(extra_bytes, 4, 64)
        for batch in (3, 9):
            counts_of_second = [second, 0, second] * (batch // 3)
            check(
                33,
                pool,
                lists(batch, 1, 130, 256),
                [first] * batch,
                extra,
                lists(batch, 1, 130, 256),
                counts_of_second,
                sink=0.3,
            )


@pytest.mark.parametrize("times", [1, 3])
def test_replays_with_other_lengths(times: int) -> None:
    """A graph reads lengths and indices when it runs; ten replays give the same bits. Tiles of 16 and 64 heads."""
    pool = quantised(584, 8, 64)
    cache, indices = pool.cache.cuda(), lists(5 * times, 1, 300, 512).cuda()
    lengths = torch.tensor([300, 0, 1, 64, 129] * times, dtype=torch.int32).cuda()
    q = torch.randn(5 * times, 1, 64, 512).bfloat16().cuda()

    def call() -> tuple[Tensor, Tensor]:
        return dsm.ops.sparse_mla_decode(q, cache, indices, softmax_scale=0.02, topk_length=lengths)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = call()
    for changed in ([300, 0, 1, 64, 129], [1, 300, 300, 0, 65], [0, 0, 0, 0, 2]):
        lengths.copy_(torch.tensor(changed * times, dtype=torch.int32))
        expected = call()
        for _ in range(10):
            graph.replay()
            assert torch.equal(replayed[0], expected[0])
            assert torch.equal(replayed[1], expected[1])


def test_what_it_leaves_to_others() -> None:
    """Caches of another dtype than the queries, of other widths, of two formats, few heads, pages off 16 bytes."""

    def refused(cache: Tensor, extra: Tensor | None = None, heads: int = 16) -> bool:
        q = torch.zeros(1, 1, heads, 576 if cache.shape[-1] in (576, 656) else cache.shape[-1], dtype=torch.bfloat16)
        indices = torch.zeros(1, 1, 5, dtype=torch.int32).cuda()
        second = {} if extra is None else {"extra_k_cache": extra.cuda(), "extra_indices": indices}
        with forced("sparse_mla_decode", "sm90"):
            try:
                dsm.ops.sparse_mla_decode(q.cuda(), cache, indices, **second)
            except ValueError as error:
                return "sm90: takes" in str(error)
        return False

    cache = torch.zeros(2, 2, 1, 576, dtype=torch.bfloat16).cuda()
    assert not refused(cache, cache)
    assert refused(cache, heads=15)
    assert refused(cache.float())
    assert refused(cache.half())
    assert refused(cache, cache.float())
    assert refused(cache, torch.zeros(2, 16, 1, 656, dtype=torch.uint8))
    assert refused(torch.zeros(2, 16, 1, 656, dtype=torch.uint8).cuda(), cache)
    assert refused(cache[..., :544].contiguous())
    odd = torch.zeros(2, 2 * 576 + 4, dtype=torch.bfloat16).cuda()[:, : 2 * 576].unflatten(1, (2, 1, 576))
    assert refused(odd)


def test_every_format_has_a_test() -> None:
    assert set(FORMATS) == {656, 352, 584, 528, 288}
