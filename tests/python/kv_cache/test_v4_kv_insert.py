# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_truth import INT64_MAX, INT64_MIN, NAMES, V4_FORMATS, V4_FP8, V41_FP4, V41_FP8, Pages, records, spread
from torch import Tensor

import ds_flashdmla_moe as dsm
from threads import assert_same_bits
from tolerance import FLOATING, assert_close

ZERO = torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("size", V4_FORMATS, ids=NAMES.get)
def test_bytes_are_those_of_the_definition(size: int, dtype: torch.dtype) -> None:
    rows = spread(9, 512).to(dtype)
    pages = Pages(size, 3, 4, padding=100)
    slots = torch.tensor([11, 0, 5, -1, 4, 3, 8, 7, 2])
    expected = pages.with_records(slots, records(rows, size))
    dsm.ops.v4_kv_insert(rows, pages.cache, slots)
    assert torch.equal(pages.buffer, expected)


def test_golden_bytes_v4_fp8() -> None:
    row = torch.zeros(1, 512, dtype=torch.bfloat16)
    row[0, 0], row[0, 63] = 448, -17  # scale 1; 17 lies between 16 and 18
    row[0, 64] = 450  # scale 2: 225, nearest 224
    row[0, 447] = 2.0**-20  # below the floor of 1e-4: scale 2^-22: 4
    row[0, 448], row[0, 511] = 1, -2.5
    cache = torch.full((1, 2, 1, 584), 255, dtype=torch.uint8)
    dsm.ops.v4_kv_insert(row, cache, ZERO + 1)
    expected = bytearray(b"\xff" * 1168)
    data = bytearray(576)
    data[0], data[63], data[64], data[447] = 0x7E, 0xD8, 0x76, 0x48
    data[448:450], data[574:576] = bytes.fromhex("803f"), bytes.fromhex("20c0")
    expected[576:1152] = data
    expected[1160:1168] = bytes([127, 128, 105, 105, 105, 105, 105, 0])
    assert bytes(cache.flatten().tolist()) == bytes(expected)


def test_golden_bytes_v41_fp8() -> None:
    row = torch.zeros(1, 512)
    row[0, 0], row[0, 31] = -448, 0.25
    row[0, 32] = 448.5  # scale 2: 224.25, nearest 224
    row[0, 511] = 7  # scale 2^-6: 448
    cache = torch.full((1, 1, 1, 528), 255, dtype=torch.uint8)
    dsm.ops.v4_kv_insert(row, cache, ZERO)
    expected = bytearray(528)
    expected[0], expected[31], expected[32], expected[511] = 0xFE, 0x28, 0x76, 0x7E
    expected[512:528] = bytes([127, 128, *[105] * 13, 121])
    assert bytes(cache.flatten().tolist()) == bytes(expected)


def test_golden_bytes_v41_fp4() -> None:
    row = torch.zeros(1, 512)
    row[0, :8] = torch.tensor([-6, 0.5, 1.75, -3.5, 1.25, 2.5, -0.25, 4.9])  # scale 1: -6, 0.5, 2, -4, 1, 2, -0, 4
    row[0, 16] = 3000  # scale 448: 6.7 saturates
    row[0, 511] = 13  # scale 13/6, nearest 2.25: 5.78
    cache = torch.full((1, 1, 1, 288), 255, dtype=torch.uint8)
    dsm.ops.v4_kv_insert(row, cache, ZERO)
    expected = bytearray(288)
    expected[0:4] = bytes.fromhex("1fe44268")
    expected[8], expected[255] = 0x07, 0x70
    expected[256:288] = b"\x38\x7e" + b"\x01" * 29 + b"\x41"
    assert bytes(cache.flatten().tolist()) == bytes(expected)


@pytest.mark.parametrize("size", [V4_FP8, V41_FP8, V41_FP4], ids=NAMES.get)
def test_scale_of_every_magnitude(size: int) -> None:
    amax = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16)  # 32640 = 8 · 4080
    rows = torch.zeros(len(amax) // 8, 8, 64, dtype=torch.bfloat16)
    rows[:, :, 50] = -amax.view(-1, 8)
    rows = torch.cat(
        (rows.flatten(1), rows.roll(1, 1).flatten(1))
    )  # also those of the last group, which V4 leaves bf16
    pages = Pages(size, len(rows), 1)
    dsm.ops.v4_kv_insert(rows, pages.cache, torch.arange(len(rows)))
    assert torch.equal(pages.buffer.view(-1, size), records(rows, size))


@pytest.mark.parametrize("size", V4_FORMATS, ids=NAMES.get)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("weighted", ["none", "same", "float32"])
@pytest.mark.parametrize("pairs", [None, 0, 32])
def test_is_rms_norm_then_rope_then_storing(size: int, dtype: torch.dtype, weighted: str, pairs: int | None) -> None:
    kv, positions = torch.randn(5, 512).to(dtype), torch.tensor([0, 3, 70000, 1048575, 9])
    weight_dtype = torch.float32 if weighted == "float32" and dtype != torch.float64 else dtype
    weight = None if weighted == "none" else torch.randn(512).to(weight_dtype)
    inv_freq = None if pairs is None else dsm.ops.rope_frequencies(2 * pairs)
    rows = kv if weight is None else dsm.ops.rms_norm(kv, weight, 1e-5)
    if inv_freq is not None:
        rows = dsm.ops.rope(rows[:, None], positions, inv_freq)[:, 0]
    slots = torch.tensor([3, 0, 4, -1, 1])
    pages = Pages(size, 2, 3)
    expected = pages.with_records(slots, records(rows, size))
    dsm.ops.v4_kv_insert(kv, pages.cache, slots, weight, 1e-5, None if pairs is None else positions, inv_freq)
    assert torch.equal(pages.buffer, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_plain_rows_match_float64(dtype: torch.dtype) -> None:
    # Of a width and a rotated part of no model.
    kv, weight, positions = torch.randn(6, 45).to(dtype), torch.randn(45).to(dtype), torch.arange(6) * 1000
    inv_freq = dsm.ops.rope_frequencies(10)
    cache = torch.zeros(2, 3, 1, 45, dtype=dtype)
    dsm.ops.v4_kv_insert(kv, cache, torch.arange(6), weight, 1e-3, positions, inv_freq)
    x = kv.double()
    x = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    angle = (positions.float()[:, None] * inv_freq).double()
    z = torch.complex(x[:, 35::2], x[:, 36::2]) * torch.polar(torch.ones_like(angle), angle)
    x[:, 35::2], x[:, 36::2] = z.real, z.imag
    assert_close("cache", cache.view(6, 45), x)


@pytest.mark.parametrize("cache_dtype", FLOATING, ids=str)
def test_plain_caches_round_to_their_dtype(cache_dtype: torch.dtype) -> None:
    kv, cache = torch.randn(3, 24).bfloat16(), torch.zeros(1, 3, 1, 24, dtype=cache_dtype)
    weight = torch.randn(24)
    dsm.ops.v4_kv_insert(kv, cache, torch.arange(3), weight)
    assert torch.equal(cache.view(3, 24), dsm.ops.rms_norm(kv, weight).to(cache_dtype))


@pytest.mark.parametrize("size", V4_FORMATS, ids=NAMES.get)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_make_their_group_nan(size: int, bad: float) -> None:
    rows = torch.ones(1, 512)
    rows[0, 130] = bad
    cache = torch.zeros(1, 1, 1, size, dtype=torch.uint8)
    dsm.ops.v4_kv_insert(rows, cache, ZERO)
    values = dsm.ops.kv_gather(cache, ZERO.int(), torch.float32)[0]
    group = {V4_FP8: 64, V41_FP8: 32, V41_FP4: 16}[size]
    assert values[128 : 128 + group].isnan().all()
    assert values.isnan().sum() == group


def test_hostile_slots_are_passed_over() -> None:
    pages = Pages(V4_FP8, 2, 3)
    dsm.ops.v4_kv_insert(torch.randn(5, 512), pages.cache, torch.tensor([-1, INT64_MIN, INT64_MAX, 6, 2**32]))
    assert (pages.buffer == 255).all()


def test_the_last_of_several_tokens_wins_for_any_number_of_threads() -> None:
    kv, slots, weight = torch.randn(500, 512), torch.randint(-1, 40, (500,)), torch.randn(512)
    expected = Pages(V4_FP8, 5, 8).with_records(slots, records(dsm.ops.rms_norm(kv, weight), V4_FP8))

    def run() -> list[Tensor]:
        pages = Pages(V4_FP8, 5, 8)
        dsm.ops.v4_kv_insert(kv, pages.cache, slots, weight)
        return [pages.buffer]

    assert torch.equal(run()[0], expected)
    assert_same_bits(run)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_page_arithmetic(data: Any) -> None:
    size = data.draw(st.sampled_from(V4_FORMATS))
    pages = Pages(size, data.draw(st.integers(0, 4)), data.draw(st.integers(0, 5)), data.draw(st.integers(0, 700)))
    slot = st.one_of(st.integers(-2, pages.rows + 1), st.sampled_from([INT64_MIN, INT64_MAX]))
    slots = torch.tensor(data.draw(st.lists(slot, max_size=6)), dtype=torch.int64)
    rows = spread(len(slots), 512)
    expected = pages.with_records(slots, records(rows, size))
    dsm.ops.v4_kv_insert(rows, pages.cache, slots)
    assert torch.equal(pages.buffer, expected)


def test_strided_rows_and_empty_problems() -> None:
    wide, pages, slots = spread(4, 700), Pages(V41_FP8, 2, 2), torch.tensor([3, 1])
    rows = wide[::2, 60:572]
    expected = pages.with_records(slots, records(rows, V41_FP8))
    dsm.ops.v4_kv_insert(rows, pages.cache, slots)
    dsm.ops.v4_kv_insert(rows[:0], pages.cache, slots[:0], torch.ones(512))
    dsm.ops.v4_kv_insert(rows, pages.cache[:0], slots)
    assert torch.equal(pages.buffer, expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kv": torch.zeros(2, 576)}, "kv must be of the cache's width, 512, got 576"),
        ({"kv": torch.zeros(2, 512, dtype=torch.uint8)}, r"kv must be \[tokens, width\]"),
        ({"cache": torch.zeros(1, 2, 1, 656, dtype=torch.uint8)}, r"cache must be .*584\|528\|288\]"),
        ({"slots": torch.zeros(2)}, r"slots must be \[tokens\] = \[2\] int64"),
        ({"weight": torch.zeros(511)}, r"weight must be \[width\] = \[512\]"),
        ({"weight": torch.zeros(512, dtype=torch.bfloat16)}, "weight must be .* float32, got .* bfloat16"),
        ({"eps": -1.0}, "eps must be at least 0"),
        ({"eps": math.nan}, "eps must be at least 0"),
        ({"positions": torch.zeros(2, dtype=torch.int64)}, "positions must be given exactly when inv_freq is"),
        ({"inv_freq": torch.zeros(2)}, "positions must be given exactly when inv_freq is, got nothing"),
        ({"positions": torch.zeros(2, dtype=torch.int32), "inv_freq": torch.zeros(2)}, "positions must be .* int64"),
        (
            {"positions": torch.zeros(2, dtype=torch.int64), "inv_freq": torch.zeros(257)},
            "inv_freq must be at most width / 2 = 256 long, got 257",
        ),
    ],
)
def test_bad_arguments_are_refused(changed: dict[str, Any], message: str) -> None:
    cache = torch.full((1, 2, 1, 584), 7, dtype=torch.uint8)
    good = {"kv": torch.zeros(2, 512), "cache": cache, "slots": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match="v4_kv_insert: " + message):
        dsm.ops.v4_kv_insert(**(good | changed))
    assert (cache == 7).all()


def test_opcheck_and_compile() -> None:
    kv, weight, positions, inv_freq = spread(3, 512), torch.ones(512), torch.arange(3), dsm.ops.rope_frequencies(64)
    slots, cache = torch.tensor([2, -1, 0]), torch.zeros(2, 2, 1, 584, dtype=torch.uint8)
    operator = torch.ops.dsm.v4_kv_insert.default
    torch.library.opcheck(operator, (kv, cache, slots, weight, 1e-6, positions, inv_freq))
    torch.library.opcheck(operator, (kv, cache, slots, None, 1e-6, None, None))
    one, two = torch.zeros_like(cache), torch.zeros_like(cache)
    compiled = torch.compile(dsm.ops.v4_kv_insert, fullgraph=True, backend="aot_eager")
    compiled(kv.requires_grad_(), one, slots, weight.requires_grad_(), 1e-6, positions, inv_freq)
    dsm.ops.v4_kv_insert(kv, two, slots, weight, 1e-6, positions, inv_freq)
    assert torch.equal(one, two)
