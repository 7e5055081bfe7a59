# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_truth import (
    E2M1,
    E4M3,
    NAMES,
    V4_FORMATS,
    V4_FP8,
    V32_FORMATS,
    V32_FP8,
    V32_NVFP4,
    V41_FP4,
    V41_FP8,
    Pages,
    width_of,
)
from torch import Tensor

import ds_flashdmla_moe as dsm
from threads import assert_same_bits
from tolerance import FLOATING

FORMATS = (*V32_FORMATS, *V4_FORMATS)
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


def random_record(size: int) -> tuple[Tensor, Tensor]:
    """The bytes of a row of random codes, all scales different from one another, and its values in float64."""
    e4m3 = torch.tensor([*E4M3, math.nan, *(-x for x in E4M3), math.nan], dtype=torch.float64)
    e2m1 = torch.tensor([*E2M1, *(-x for x in E2M1)], dtype=torch.float64)

    def numbers(count: int) -> Tensor:
        return (torch.randint(127, (count,)) + 128 * torch.randint(2, (count,))).to(torch.uint8)

    def pairs(count: int) -> tuple[Tensor, Tensor]:
        codes = torch.randint(256, (count // 2,))
        return codes.to(torch.uint8), e2m1[torch.stack((codes % 16, codes // 16), -1).flatten()]

    rope = torch.randn(64).bfloat16()
    if size == V32_FP8:
        codes, scales = numbers(512), torch.rand(4)
        record = torch.cat((codes, scales.view(torch.uint8), rope.view(torch.uint8)))
        # The product is defined in float32.
        latent = (e4m3[codes.int()].float().view(4, 128) * scales[:, None]).flatten()
        return record, torch.cat((latent.double(), rope.double()))
    if size == V32_NVFP4:
        codes, latent = pairs(512)
        unscaled, scales = numbers(64), torch.arange(32, dtype=torch.uint8) * 3 + 1
        values = (latent.view(32, 16) * e4m3[scales.int()][:, None]).flatten()
        return torch.cat((codes, unscaled, scales)), torch.cat((values, e4m3[unscaled.int()]))
    if size == V4_FP8:
        codes, scales = numbers(448), torch.tensor([100, 127, 130, 126, 117, 111, 140], dtype=torch.uint8)
        values = (e4m3[codes.int()].view(7, 64) * torch.exp2(scales.double() - 127)[:, None]).flatten()
        pad = torch.tensor([0x5A], dtype=torch.uint8)  # must not matter
        return torch.cat((codes, rope.view(torch.uint8), scales, pad)), torch.cat((values, rope.double()))
    if size == V41_FP8:
        codes, scales = numbers(512), torch.arange(16, dtype=torch.uint8) + 119
        values = (e4m3[codes.int()].view(16, 32) * torch.exp2(scales.double() - 127)[:, None]).flatten()
        return torch.cat((codes, scales)), values
    codes, elements = pairs(512)
    scales = torch.arange(32, dtype=torch.uint8) * 3 + 1
    return torch.cat((codes, scales)), (elements.view(32, 16) * e4m3[scales.int()][:, None]).flatten()


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("size", FORMATS, ids=NAMES.get)
def test_values_are_those_of_the_definition(size: int, dtype: torch.dtype) -> None:
    # All other rows, and the padding, are NaN.
    pages = Pages(size, 3, 5, padding=77)
    truth = torch.zeros(15, width_of(size), dtype=torch.float64)
    for slot in (0, 4, 7, 14):
        record, truth[slot] = random_record(size)
        pages.put(slot, record)
    indices = torch.tensor([[7, 0, -1], [14, 7, 4]], dtype=torch.int32)
    rows = dsm.ops.kv_gather(pages.cache, indices, dtype)
    assert rows.shape == (2, 3, width_of(size))
    expected = (truth[indices.long()] * (indices >= 0)[..., None]).float().to(dtype)
    assert torch.equal(rows, expected)
    assert torch.equal(dsm.ops.kv_gather(pages.cache.view(torch.float8_e4m3fn), indices, dtype), expected)
    assert torch.equal(dsm.ops.kv_gather(pages.cache.view(torch.int8), indices, dtype), expected)


@pytest.mark.parametrize("size", [s for s in FORMATS if s != V32_FP8], ids=NAMES.get)
def test_values_are_exact_in_bfloat16(size: int) -> None:
    pages = Pages(size, 1, 1)
    record, truth = random_record(size)
    pages.put(0, record)
    assert torch.equal(dsm.ops.kv_gather(pages.cache, torch.zeros(1, dtype=torch.int32))[0].double(), truth)


@pytest.mark.parametrize("size", FORMATS, ids=NAMES.get)
def test_nan_rows_show_only_where_they_are_named(size: int) -> None:
    cache = Pages(size, 2, 2).cache
    rows = dsm.ops.kv_gather(cache, torch.tensor([1, -1], dtype=torch.int32), torch.float32)
    scaled = slice(0, 256)
    assert rows[0, scaled].isnan().all()
    assert (rows[1] == 0).all()


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("cache_dtype", FLOATING, ids=str)
def test_plain_caches(cache_dtype: torch.dtype, dtype: torch.dtype) -> None:
    buffer = torch.randn(4, 150).to(cache_dtype)
    cache = buffer.as_strided((4, 3, 1, 37), (150, 37, 37, 1))
    indices = torch.tensor([11, 0, 5, 5, -1], dtype=torch.int32)
    expected = cache.flatten(0, 2)[indices.clamp_min(0)]
    expected[4] = 0
    assert torch.equal(dsm.ops.kv_gather(cache, indices, dtype), expected.to(dtype))


@pytest.mark.parametrize("size", FORMATS, ids=NAMES.get)
def test_indices_that_are_no_rows_give_zeros(size: int) -> None:
    cache = Pages(size, 2, 3).cache
    indices = torch.tensor([-1, INT32_MIN, INT32_MAX, 6, 7, -6], dtype=torch.int32)
    assert (dsm.ops.kv_gather(cache, indices) == 0).all()
    assert (dsm.ops.kv_gather(cache[:0], indices) == 0).all()
    assert (dsm.ops.kv_gather(cache[:, :0], indices) == 0).all()


def test_shapes_of_indices() -> None:
    cache = torch.randn(2, 3, 1, 5)
    one = dsm.ops.kv_gather(cache, torch.tensor(4, dtype=torch.int32), torch.float32)
    assert torch.equal(one, cache[1, 1, 0])
    assert dsm.ops.kv_gather(cache, torch.zeros(2, 0, 3, dtype=torch.int32)).shape == (2, 0, 3, 5)
    strided = torch.arange(6, dtype=torch.int32).view(2, 3).t()
    assert torch.equal(dsm.ops.kv_gather(cache, strided, torch.float32), cache.view(6, 5)[strided])


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_what_was_inserted_is_read_back(data: Any) -> None:
    """To within the formats' steps; and what a power of two scales is quantised once more to itself."""
    size = data.draw(st.sampled_from(FORMATS))
    pages = Pages(size, data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5)), data.draw(st.integers(0, 600)))
    count = data.draw(st.integers(1, pages.rows))
    exponent = data.draw(st.integers(-12, 6))
    slots = torch.randperm(pages.rows)[:count]
    rows = (torch.randn(count, width_of(size)) * 2.0**exponent).bfloat16()

    def insert(values: Tensor) -> None:
        if width_of(size) == 576:
            dsm.ops.mla_kv_insert(values[:, :512], values[:, 512:], pages.cache, slots)
        else:
            dsm.ops.v4_kv_insert(values, pages.cache, slots)

    insert(rows)
    read = dsm.ops.kv_gather(pages.cache, slots.int(), torch.float32)
    group = {656: 128, 352: 16, 584: 64, 528: 32, 288: 16}[size]
    columns = 448 // group * group
    amax = rows[:, :columns].float().unflatten(-1, (-1, group)).abs().amax(-1, keepdim=True)
    error = (read - rows.float())[:, :columns].unflatten(-1, (-1, group)).abs()
    if size in (V32_NVFP4, V41_FP4):
        # Half a step of 2 in 6; the scale is rounded by 1/16 of itself, below 2^-6 by 2^-10, six times that saturates.
        assert (error <= 17 / 16 / 6 * amax + 6 * 2.0**-10).all()
    else:
        # Half a step of 32 in 448; the scale may be twice as large as needed.
        assert (error <= 2 * 16 / 448 * amax.clamp_min(1e-4)).all()
        insert(read)
        assert torch.equal(dsm.ops.kv_gather(pages.cache, slots.int(), torch.float32), read)


def test_pages_more_than_two_gigabytes_apart() -> None:
    stride = 2**31 + 24
    buffer = torch.empty(stride + 4 * 584, dtype=torch.uint8)  # memory that is never touched is never taken
    far = buffer.as_strided((2, 2, 1, 584), (stride, 584, 584, 1))
    near = torch.zeros(2, 2, 1, 584, dtype=torch.uint8)
    rows, slots = torch.randn(2, 512), torch.tensor([3, 2])
    for cache in (far, near):
        dsm.ops.v4_kv_insert(rows, cache, slots)
    assert torch.equal(far[1], near[1])
    assert torch.equal(dsm.ops.kv_gather(far, slots.int()), dsm.ops.kv_gather(near, slots.int()))


def test_same_bits_for_any_number_of_threads() -> None:
    cache = torch.randint(120, (4, 8, 1, 584), dtype=torch.uint8)
    indices = torch.randint(-1, 33, (500,), dtype=torch.int32)
    assert_same_bits(lambda: [dsm.ops.kv_gather(cache, indices)])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cache": torch.zeros(1, 2, 1, 655, dtype=torch.uint8)}, r"cache must be .*656\|352\|584\|528\|288\]"),
        ({"cache": torch.tensor(0, dtype=torch.uint8)}, "cache must be"),
        ({"cache": torch.zeros(1, 2, 1, 4, dtype=torch.int64)}, "cache must be"),
        ({"cache": torch.zeros(1, 2, 1, 8)[..., ::2]}, "cache must be without gaps inside a page"),
        ({"cache": torch.zeros(1, 2, 1, 8).expand(2, 2, 1, 8)}, "cache must be with pages at least 16 elements apart"),
        ({"indices": torch.zeros(2, dtype=torch.int64)}, r"indices must be \[count\] = \[any\] int32"),
        ({"dtype": torch.int32}, "out must be .* got .* int32"),
    ],
)
def test_bad_arguments_are_refused(changed: dict[str, Any], message: str) -> None:
    good = {"cache": torch.zeros(1, 2, 1, 584, dtype=torch.uint8), "indices": torch.zeros(2, dtype=torch.int32)}
    with pytest.raises(ValueError, match="kv_gather: " + message):
        dsm.ops.kv_gather(**(good | changed))


@pytest.mark.parametrize("size", [*FORMATS, 12], ids=str)
def test_opcheck_and_compile(size: int) -> None:
    cache = torch.zeros(2, 2, 1, size, dtype=torch.float32 if size == 12 else torch.uint8)
    indices = torch.tensor([3, -1, 0], dtype=torch.int32)
    torch.library.opcheck(torch.ops.dsm.kv_gather.default, (cache, indices, torch.bfloat16))
    compiled = torch.compile(dsm.ops.kv_gather, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(cache, indices), dsm.ops.kv_gather(cache, indices))
