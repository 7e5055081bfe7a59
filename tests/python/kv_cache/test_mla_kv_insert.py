# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_truth import INT64_MAX, INT64_MIN, NAMES, V32_FORMATS, V32_FP8, V32_NVFP4, Pages, power_of_two, records, spread
from torch import Tensor

import ds_flashdmla_moe as dsm
from threads import assert_same_bits
from tolerance import FLOATING

WAYS = [(V32_FP8, "ue8m0"), (V32_FP8, "fp32"), (V32_NVFP4, "ue8m0")]


def insert(rows: Tensor, cache: Tensor, slots: Tensor, scale_format: str = "ue8m0", d_latent: int = 512) -> None:
    dsm.ops.mla_kv_insert(rows[:, :d_latent], rows[:, d_latent:], cache, slots, scale_format)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize(("size", "scale_format"), WAYS)
def test_bytes_are_those_of_the_definition(size: int, scale_format: str, dtype: torch.dtype) -> None:
    rows = spread(11, 576).to(dtype)
    pages = Pages(size, 3, 5, padding=40)
    slots = torch.tensor([14, 0, 5, -1, 7, 6, 9, 1, 2, 13, 4])
    expected = pages.with_records(slots, records(rows, size, scale_format))
    insert(rows, pages.cache, slots, scale_format)
    assert torch.equal(pages.buffer, expected)


def test_golden_bytes_v32_fp8() -> None:
    row = torch.zeros(1, 576, dtype=torch.bfloat16)
    row[0, 0], row[0, 1], row[0, 127] = 448, -1, 17  # scale 1; 17 lies between 16 and 18
    row[0, 256] = 3  # scale 2^-7: 384
    row[0, 384], row[0, 511] = 1000, -0.0  # scale 4: 250, nearest 256
    row[0, 512], row[0, 575] = 1, -2.5
    cache = torch.full((1, 1, 1, 656), 255, dtype=torch.uint8)
    insert(row, cache, torch.zeros(1, dtype=torch.int64))
    expected = bytearray(656)
    expected[0], expected[1], expected[127], expected[256], expected[384], expected[511] = (
        0x7E, 0xB8, 0x58, 0x7C, 0x78, 0x80,
    )  # fmt: skip
    # 1, 2^-22 for a group of zeros, 2^-7, 4 in float32; 1 and -2.5 in bfloat16
    expected[512:528] = bytes.fromhex("0000803f000080340000003c00008040")
    expected[528:530], expected[654:656] = bytes.fromhex("803f"), bytes.fromhex("20c0")
    assert bytes(cache.flatten().tolist()) == bytes(expected)
    # float32 scales: 1, the smallest normal number, 3/448 and 1000/448, both elements 448
    insert(row, cache, torch.zeros(1, dtype=torch.int64), "fp32")
    expected[256] = expected[384] = 0x7E
    expected[512:528] = bytes.fromhex("0000803f00008000b76ddb3b6edb0e40")
    assert bytes(cache.flatten().tolist()) == bytes(expected)


def test_golden_bytes_v32_nvfp4() -> None:
    row = torch.zeros(1, 576)
    row[0, :8] = torch.tensor([6, -6, 0.75, 2.5, -1.25, 5, 0.25, 0.3])  # scale 1: 6, -6, 1, 2, -1, 4, 0, 0.5
    row[0, 32] = 6 * 1.0625  # 17/16 lies between 1 and 1.125 and becomes 1: 6.375 saturates
    row[0, 511] = 1e-3  # scale 2^-9: 0.512
    row[0, 512:516] = torch.tensor([1, -1e6, 448, 2.0**-10])  # the last lies between 0 and 2^-9
    cache = torch.full((1, 1, 1, 352), 255, dtype=torch.uint8)
    insert(row, cache, torch.zeros(1, dtype=torch.int64))
    expected = bytearray(352)
    expected[0:4] = bytes.fromhex("f7426a10")
    expected[16], expected[255] = 0x07, 0x10
    expected[256:260] = bytes.fromhex("38fe7e00")
    expected[320:352] = b"\x38" * 31 + b"\x01"
    assert bytes(cache.flatten().tolist()) == bytes(expected)


@pytest.mark.parametrize("scale_format", ["ue8m0", "fp32"])
def test_scale_of_every_magnitude_v32_fp8(scale_format: str) -> None:
    amax = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16)
    amax = torch.cat((torch.zeros(1, dtype=torch.bfloat16), amax))  # 32640 = 4 · 8160
    latent = torch.zeros(len(amax) // 4, 4, 128, dtype=torch.bfloat16)
    latent[:, :, 77] = -amax.view(-1, 4)
    cache = torch.empty(len(latent), 1, 1, 656, dtype=torch.uint8)
    rope = torch.zeros(len(latent), 64, dtype=torch.bfloat16)
    dsm.ops.mla_kv_insert(latent.flatten(1), rope, cache, torch.arange(len(latent)), scale_format)
    scales = cache.flatten(0, 2)[:, 512:528].contiguous().view(torch.float32).flatten()
    if scale_format == "fp32":
        assert torch.equal(scales, (amax.float() / 448).clamp_min(2.0**-126))
    else:
        assert torch.equal(scales.double(), torch.exp2(power_of_two(amax).double()))
        normal = amax >= 1e-4
        assert (scales.double() * 448 >= amax.double())[normal].all()
        assert (scales.double() * 224 < amax.double())[normal].all()


def test_scale_of_every_magnitude_v32_nvfp4() -> None:
    amax = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16)
    latent = torch.zeros(len(amax) // 32, 32, 16, dtype=torch.bfloat16)
    latent[:, :, 3] = amax.view(-1, 32)
    rows = torch.nn.functional.pad(latent.flatten(1), (0, 64))
    pages = Pages(V32_NVFP4, len(rows), 1)
    insert(rows, pages.cache, torch.arange(len(rows)))
    assert torch.equal(pages.buffer.view(-1, 352), records(rows, V32_NVFP4))


@pytest.mark.parametrize("size", V32_FORMATS, ids=NAMES.get)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_make_their_group_nan(size: int, bad: float) -> None:
    rows = torch.ones(1, 576)
    rows[0, 130] = bad
    cache = torch.zeros(1, 1, 1, size, dtype=torch.uint8)
    for scale_format in ("ue8m0", "fp32"):
        insert(rows, cache, torch.zeros(1, dtype=torch.int64), scale_format)
        values = dsm.ops.kv_gather(cache, torch.zeros(1, dtype=torch.int32), torch.float32)[0]
        group = 128 if size == V32_FP8 else 16
        assert values[128 : 128 + group].isnan().all()
        assert values.isnan().sum() == group


@pytest.mark.parametrize("cache_dtype", FLOATING, ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_plain_caches_round_to_their_dtype(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    # Sizes of no model.
    rows, slots = torch.randn(7, 37).to(dtype), torch.tensor([5, 0, 11, 3, -1, 2, 12])
    buffer = torch.full((4, 150), math.nan, dtype=cache_dtype)
    cache = buffer.as_strided((4, 3, 1, 37), (150, 37, 37, 1))
    expected = buffer.clone()
    for slot, row in zip(slots.tolist(), rows, strict=True):
        if 0 <= slot < 12:
            expected[slot // 3, slot % 3 * 37 : slot % 3 * 37 + 37] = row.to(cache_dtype)
    insert(rows, cache, slots, d_latent=21)
    assert torch.equal(buffer.nan_to_num(-77), expected.nan_to_num(-77))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn], ids=str)
def test_bytes_of_any_name(dtype: torch.dtype) -> None:
    rows, pages, slots = spread(2, 576), Pages(V32_FP8, 1, 2), torch.arange(2)
    expected = pages.with_records(slots, records(rows, V32_FP8))
    insert(rows, pages.cache.view(dtype), slots)
    assert torch.equal(pages.buffer, expected)


def test_hostile_slots_are_passed_over() -> None:
    rows, pages = spread(6, 576), Pages(V32_NVFP4, 2, 3)
    slots = torch.tensor([-1, INT64_MIN, INT64_MAX, 6, -(2**31), 2**32])
    insert(rows, pages.cache, slots)
    assert (pages.buffer == 255).all()


def test_the_last_of_several_tokens_wins_for_any_number_of_threads() -> None:
    rows = torch.randn(600, 576)
    slots = torch.randint(-1, 40, (600,))
    expected = Pages(V32_FP8, 5, 8).with_records(slots, records(rows, V32_FP8))

    def run() -> list[Tensor]:
        pages = Pages(V32_FP8, 5, 8)
        insert(rows, pages.cache, slots)
        return [pages.buffer]

    assert torch.equal(run()[0], expected)
    assert_same_bits(run)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_page_arithmetic(data: Any) -> None:
    size = data.draw(st.sampled_from(V32_FORMATS))
    pages = Pages(size, data.draw(st.integers(0, 4)), data.draw(st.integers(0, 5)), data.draw(st.integers(0, 700)))
    slot = st.one_of(st.integers(-2, pages.rows + 1), st.sampled_from([INT64_MIN, INT64_MAX]))
    slots = torch.tensor(data.draw(st.lists(slot, max_size=6)), dtype=torch.int64)
    rows = spread(len(slots), 576)
    expected = pages.with_records(slots, records(rows, size))
    insert(rows, pages.cache, slots)
    assert torch.equal(pages.buffer, expected)


def test_strided_rows_and_empty_problems() -> None:
    wide, pages, slots = spread(4, 700), Pages(V32_FP8, 2, 2), torch.tensor([3, 1])
    rows = wide[::2, 60:636]
    expected = pages.with_records(slots, records(rows, V32_FP8))
    insert(rows, pages.cache, slots)
    assert torch.equal(pages.buffer, expected)
    insert(rows[:0], pages.cache, slots[:0])
    assert torch.equal(pages.buffer, expected)
    insert(rows, pages.cache[:0], slots)


def test_gradients_do_not_go_through() -> None:
    rows, pages = torch.randn(2, 576, requires_grad=True), Pages(V32_FP8, 1, 2)
    insert(rows, pages.cache, torch.arange(2))
    assert torch.equal(pages.buffer.view(2, 656), records(rows.detach(), V32_FP8))
    assert not pages.buffer.requires_grad


GOOD: dict[str, Any] = {
    "latent": torch.zeros(2, 512),
    "k_pe": torch.zeros(2, 64),
    "slots": torch.zeros(2, dtype=torch.int64),
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"latent": torch.zeros(2, 512, dtype=torch.int32)}, r"latent must be \[tokens, d_latent\] .* got .* int32"),
        ({"latent": torch.zeros(512, 2).t()}, "latent must be contiguous in its last dimension"),
        ({"k_pe": torch.zeros(3, 64)}, r"k_pe must be \[tokens, d_rope\] = \[2, any\]"),
        ({"k_pe": torch.zeros(2, 64, dtype=torch.float16)}, "k_pe must be .* float32, got .* float16"),
        ({"k_pe": torch.zeros(2, 32)}, r"d_latent \+ d_rope must be 512 \+ 64 for a quantised cache, got 512 \+ 32"),
        ({"cache": torch.zeros(1, 2, 1, 570)}, r"d_latent \+ d_rope must be the cache's width, 570, got 512 \+ 64"),
        (
            {"cache": torch.zeros(1, 2, 1, 584, dtype=torch.uint8)},
            r"cache must be .*656\|352\] .* got .* 584\]",
        ),
        ({"cache": torch.zeros(1, 2, 2, 656, dtype=torch.uint8)}, "cache must be"),
        ({"cache": torch.zeros(2, 1, 656, dtype=torch.uint8)}, "cache must be"),
        ({"cache": torch.zeros(1, 2, 1, 576, dtype=torch.int32)}, "cache must be"),
        ({"cache": torch.zeros(1, 4, 1, 656, dtype=torch.uint8)[:, ::2]}, "cache must be without gaps inside a page"),
        (
            {"cache": torch.zeros(1, 2, 1, 656, dtype=torch.uint8).expand(3, -1, -1, -1)},
            "cache must be with pages at least 1312",
        ),
        ({"slots": torch.zeros(2, dtype=torch.int32)}, r"slots must be \[tokens\] = \[2\] int64"),
        ({"slots": torch.zeros(3, dtype=torch.int64)}, r"slots must be \[tokens\] = \[2\] int64"),
        ({"scale_format": "e8m0"}, r"scale_format must be ue8m0\|fp32, got 'e8m0'"),
    ],
)
def test_bad_arguments_are_refused(changed: dict[str, Any], message: str) -> None:
    cache = torch.full((1, 2, 1, 656), 7, dtype=torch.uint8)
    with pytest.raises(ValueError, match="mla_kv_insert: " + message):
        dsm.ops.mla_kv_insert(**(GOOD | {"cache": cache} | changed))
    assert (cache == 7).all()


def test_opcheck_and_compile() -> None:
    rows, pages, slots = spread(3, 576), Pages(V32_FP8, 2, 2), torch.tensor([2, -1, 0])
    expected = pages.with_records(slots, records(rows, V32_FP8))
    cache = torch.zeros(2, 2, 1, 656, dtype=torch.uint8)
    torch.library.opcheck(torch.ops.dsm.mla_kv_insert.default, (rows[:, :512], rows[:, 512:], cache, slots, "ue8m0"))
    compiled = torch.compile(insert, fullgraph=True, backend="aot_eager")
    compiled(rows, pages.cache, slots)
    assert torch.equal(pages.buffer, expected)
