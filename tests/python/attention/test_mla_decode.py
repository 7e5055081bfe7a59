# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import random
from typing import Any, NamedTuple

import pytest
import torch
from cache_layouts import BYTE_TYPES, e4m3
from mla_truth import attend_all
from torch import Tensor

import ds_flashdmla_moe as dsm
from threads import assert_same_bits
from tolerance import FLOATING, assert_close

INT_MIN, INT_MAX = -(2**31), 2**31 - 1


class Case(NamedTuple):
    lengths: tuple[int, ...]
    s_q: int
    h_q: int
    h_kv: int
    d_qk: int
    d_v: int
    page_size: int
    causal: bool = True


CASES = [
    Case((1,), 1, 1, 1, 1, 1, 1),
    Case((5, 0, 1), 1, 4, 1, 24, 16, 2),
    Case((7, 3, 1, 0), 3, 4, 2, 9, 9, 3),  # causal: the first queries of short requests have no key
    Case((7, 3, 1, 0), 3, 4, 2, 9, 0, 3, causal=False),
    Case((130, 127, 128), 2, 6, 3, 40, 32, 64),  # one off the tiles of 128 keys
    Case((1030,), 2, 3, 1, 16, 8, 64),  # parts of 1024 keys
    Case((70, 200), 150, 3, 1, 8, 5, 16),  # blocks of queries
    Case((40,), 1, 16, 1, 576, 512, 64),
    Case((), 2, 4, 2, 8, 8, 4),
    Case((3,), 0, 4, 2, 8, 8, 4),
    Case((3,), 1, 0, 1, 8, 8, 4),
]


def paged(case: Case, dtype: torch.dtype, q_dtype: torch.dtype | None = None) -> dict[str, Any]:
    """A cache of this dtype whose unused rows hold NaN, a table with garbage beyond the lengths; q by default alike."""
    pages_of = [-(-length // case.page_size) for length in case.lengths]
    pages = sum(pages_of) + 2
    rows = torch.randn(pages, case.page_size, case.h_kv, case.d_qk)
    table = torch.empty(len(case.lengths), max(pages_of, default=0) + 3, dtype=torch.int32)
    table.copy_(torch.tensor([-1, INT_MIN, INT_MAX, pages])[torch.randint(4, table.shape)])
    free = torch.randperm(pages).tolist()
    used = torch.zeros(pages, case.page_size, dtype=torch.bool)
    for b, (length, count) in enumerate(zip(case.lengths, pages_of, strict=True)):
        table[b, :count] = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
        for j in range(length):
            used[table[b, j // case.page_size], j % case.page_size] = True
    if dtype in BYTE_TYPES:
        codes = rows.to(torch.float8_e4m3fn).view(torch.uint8)
        codes[~used] = 0xFF
        cache = codes.view(dtype)
    else:
        rows[~used] = torch.nan
        cache = rows.to(dtype)
    q = torch.randn(len(case.lengths), case.s_q, case.h_q, case.d_qk) * 3
    return {
        "q": q.to(q_dtype or (torch.float32 if dtype in BYTE_TYPES else dtype)),
        "k_cache": cache,
        "block_table": table,
        "cache_seqlens": torch.tensor(case.lengths, dtype=torch.int32),
        "d_v": case.d_v,
        "causal": case.causal,
    }


def truth(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    d_v: int,
    causal: bool,
    softmax_scale: float | None = None,
    k_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    values = e4m3(k_cache) if k_cache.dtype in BYTE_TYPES else k_cache.double()
    values = values * (1 if k_scale is None else k_scale.double())
    page_size, group = k_cache.shape[1], max(q.shape[2] // k_cache.shape[2], 1)

    def keys_of(b: int, i: int, h: int) -> Tensor:
        length = int(cache_seqlens[b])
        seen = max(length - (q.shape[1] - 1 - i), 0) if causal else length
        places = [(int(block_table[b, j // page_size]), j % page_size) for j in range(seen)]
        pages, rows = torch.tensor(places, dtype=torch.long).reshape(-1, 2).T
        return values[pages, rows, h // group]

    return attend_all(q, keys_of, d_v, q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)


def check(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    out, lse = dsm.ops.mla_decode(**inputs)
    expected, expected_lse = truth(**inputs)
    assert out.dtype == inputs["q"].dtype
    assert lse.dtype == (torch.float64 if out.dtype == torch.float64 else torch.float32)
    assert_close("out", out, expected)
    assert_close("lse", lse, expected_lse)
    return out, lse


@pytest.mark.parametrize("dtype", [*FLOATING, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_matches_float64(case: Case, dtype: torch.dtype) -> None:
    check(paged(case, dtype))


def test_a_query_without_keys() -> None:
    out, lse = check(paged(Case((2, 0), 3, 2, 1, 4, 3, 2), torch.bfloat16))
    assert not out[0, 0].any()
    assert not out[1].any()
    assert (lse[0, :, 0] == torch.inf).all()
    assert (lse[1] == torch.inf).all()
    assert lse[0, :, 1:].isfinite().all()


@pytest.mark.parametrize("q_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", BYTE_TYPES, ids=str)
def test_fp8_cache_with_a_scale(dtype: torch.dtype, q_dtype: torch.dtype) -> None:
    inputs = paged(Case((9, 4), 2, 4, 2, 16, 12, 4), dtype, q_dtype)
    for scale in (torch.tensor(0.37), torch.tensor([2.5]), None):
        check({**inputs, "k_scale": scale})


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("q_dtype", FLOATING, ids=str)
def test_a_plain_cache_may_have_another_dtype(q_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """What counts is its numbers, in the dtype computed in."""
    inputs = paged(Case((130, 0, 5), 2, 4, 2, 24, 16, 4), dtype, q_dtype)
    if dtype == torch.float64 != q_dtype:
        with pytest.raises(ValueError, match=r"k_cache must be .* got .* float64"):
            dsm.ops.mla_decode(**inputs)
        return
    results = check(inputs)
    wide = {**inputs, "k_cache": inputs["k_cache"].to(torch.promote_types(q_dtype, torch.float32))}
    assert all(torch.equal(a, b) for a, b in zip(results, dsm.ops.mla_decode(**wide), strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_fuzz(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    h_kv, d_qk = rng.choice([1, 1, 2, 3]), rng.choice([1, 7, 16, 33])
    case = Case(
        tuple(rng.choice([0, 1, 2, 15, 64, 129]) for _ in range(rng.choice([1, 2, 4]))), rng.choice([1, 2, 5]),
        h_kv * rng.choice([1, 2, 5]), h_kv, d_qk, rng.randint(0, d_qk), rng.choice([1, 2, 3, 5, 64]),
        rng.random() < 0.5,
    )  # fmt: skip
    dtype = rng.choice([*FLOATING, *BYTE_TYPES])
    print(seed, case, dtype)
    check({**paged(case, dtype), "softmax_scale": rng.choice([None, 0.3, -0.2, 0.0])})


def test_views_are_read_in_place() -> None:
    inputs = paged(Case((9, 5), 2, 4, 2, 8, 8, 2), torch.float32)
    expected = dsm.ops.mla_decode(**inputs)
    k_cache, table = inputs["k_cache"], inputs["block_table"]
    wide = torch.full((len(k_cache), 3, 2, 2, 13), torch.nan)  # pages, rows and heads apart
    wide[:, 0, ..., 2:10] = k_cache
    strided = {
        "q": torch.stack((inputs["q"],) * 2, -1)[..., 0],
        "k_cache": wide[:, 0, ..., 2:10],
        "block_table": torch.cat((table, table), 1)[:, : table.shape[1]],
    }
    for result, truth in zip(dsm.ops.mla_decode(**{**inputs, **strided}), expected, strict=True):
        assert torch.equal(result, truth)


def test_a_given_output_is_written_in_place() -> None:
    inputs = paged(Case((9, 5), 2, 4, 2, 8, 6, 2), torch.bfloat16)
    expected, expected_lse = dsm.ops.mla_decode(**inputs)
    memory = torch.full((2, 4, 2, 9), torch.nan, dtype=torch.bfloat16)
    out = memory.transpose(1, 2)[..., 1:7]
    result, lse = dsm.ops.mla_decode(**inputs, out=out)
    assert result is out
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    assert memory[..., [0, 7, 8]].isnan().all()
    before = memory.clone()
    for wrong, message in (
        (out[..., :5], "out must be"),
        (out[:1], "out must be"),
        (out.float(), "out must be .* bfloat16, got .* float32"),
        (torch.empty(2, 2, 6, 4, dtype=torch.bfloat16).mT, "out must be contiguous in its last dimension"),
    ):
        with pytest.raises(ValueError, match=message):
            dsm.ops.mla_decode(**inputs, out=wrong)
    with pytest.raises(ValueError, match="block_table must be"):
        dsm.ops.mla_decode(**{**inputs, "block_table": inputs["block_table"] % 7 + 99}, out=out)
    assert torch.equal(memory.nan_to_num(7), before.nan_to_num(7))


def test_page_size_does_not_change_a_bit() -> None:
    q, rows = torch.randn(1, 1, 4, 16), torch.randn(300, 16)
    results = []
    for page_size in (1, 3, 100, 300):
        cache = rows.reshape(-1, page_size, 1, 16)
        table = torch.arange(len(cache), dtype=torch.int32)[None]
        results.append(dsm.ops.mla_decode(q, cache, table, torch.tensor([300], dtype=torch.int32), 8)[0])
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_request_does_not_depend_on_its_batch() -> None:
    inputs = paged(Case((1100, 3, 64), 2, 4, 1, 16, 8, 64), torch.float32)
    out, lse = dsm.ops.mla_decode(**inputs)
    for b in range(3):
        one = {name: inputs[name][b : b + 1] for name in ("q", "block_table", "cache_seqlens")}
        alone, lse_alone = dsm.ops.mla_decode(**{**inputs, **one})
        assert torch.equal(alone[0], out[b])
        assert torch.equal(lse_alone[0], lse[b])


@pytest.mark.parametrize("lengths", [(2500,), (70, 1200, 0, 5)], ids=str)
def test_same_bits_for_any_number_of_threads(lengths: tuple[int, ...]) -> None:
    inputs = paged(Case(lengths, 2, 4, 2, 16, 8, 64), torch.float32)
    assert_same_bits(lambda: dsm.ops.mla_decode(**inputs))


def test_scores_beyond_the_range_of_exp() -> None:
    inputs = paged(Case((200,), 1, 2, 1, 16, 16, 4), torch.float64)
    inputs["q"] *= 1000
    check(inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4, 8)}, r"q must be \[batch, s_q, h_q, d_qk\]"),
        ({"q": torch.zeros(2, 1, 3, 8)}, "h_q must be a multiple of h_kv = 2, got 3"),
        ({"q": torch.zeros(2, 1, 4, 8, dtype=torch.int32)}, "q must be .* got .* int32"),
        ({"q": torch.zeros(2, 1, 4, 9)}, "k_cache must be .* 9"),
        ({"k_cache": torch.zeros(5, 2, 2, 8).int()}, "k_cache must be .* got .* int32"),
        ({"k_cache": torch.zeros(5, 0, 2, 8)}, "page_size must be at least 1"),
        ({"k_cache": torch.zeros(5, 2, 8, 2).mT}, "k_cache must be contiguous in its last dimension"),
        ({"k_cache": torch.zeros(5, 2, 0, 8)}, "h_q must be a multiple of h_kv = 0"),
        ({"d_v": 9}, "d_v must be at most d_qk = 8, got 9"),
        ({"d_v": -1}, "d_v must be at least 0"),
        ({"cache_seqlens": torch.tensor([3, -1], dtype=torch.int32)}, "cache_seqlens must be between 0 and .* got -1"),
        ({"cache_seqlens": torch.tensor([3, 7], dtype=torch.int32)}, "cache_seqlens must be between 0 and .* = 6"),
        ({"cache_seqlens": torch.tensor([3, INT_MAX], dtype=torch.int32)}, "cache_seqlens must be"),
        ({"cache_seqlens": torch.tensor([3, 4])}, "cache_seqlens must be .* int32"),
        ({"block_table": torch.zeros(1, 3, dtype=torch.int32)}, r"block_table must be \[batch, max_pages\]"),
        ({"block_table": torch.tensor([[0, 1, 2], [0, 5, 2]]).int()}, r"block_table must be .* got 5 at \[1, 1\]"),
        ({"block_table": torch.tensor([[0, -1, 2], [0, 1, 2]]).int()}, r"block_table must be .* got -1 at \[0, 1\]"),
        ({"k_scale": torch.tensor(1.0)}, "k_scale must be absent without an FP8 cache"),
        ({"k_cache": torch.zeros(5, 2, 2, 8, dtype=torch.uint8), "k_scale": torch.ones(2)}, "k_scale must be"),
        ({"q": torch.zeros(2, 1, 4, 8).double(), "k_cache": torch.zeros(5, 2, 2, 8, dtype=torch.uint8)}, "k_cache"),
        ({"softmax_scale": float("nan")}, "softmax_scale must be finite"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    inputs = {
        "q": torch.zeros(2, 1, 4, 8),
        "k_cache": torch.zeros(5, 2, 2, 8),
        "block_table": torch.tensor([[0, 1, 2], [3, 4, 0]], dtype=torch.int32),
        "cache_seqlens": torch.tensor([6, 4], dtype=torch.int32),
        "d_v": 4,
    }
    dsm.ops.mla_decode(**inputs)
    with pytest.raises(ValueError, match=message):
        dsm.ops.mla_decode(**{**inputs, **change})


def test_differentiation_is_refused() -> None:
    inputs = paged(Case((3,), 1, 1, 1, 4, 4, 1), torch.float32)
    inputs["q"].requires_grad_()
    with pytest.raises(NotImplementedError, match="mla_decode has no gradient"):
        dsm.ops.mla_decode(**inputs)[0].sum().backward()
    out = torch.empty(1, 1, 1, 4)
    with pytest.raises(ValueError, match="mla_decode: out must be None where gradients are recorded"):
        dsm.ops.mla_decode(**inputs, out=out)
    with torch.no_grad():
        assert dsm.ops.mla_decode(**inputs, out=out)[0] is out


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_opcheck_and_compile(dtype: torch.dtype) -> None:
    inputs = paged(Case((5, 2), 2, 4, 2, 8, 6, 2), dtype)
    tensors = [inputs[name] for name in ("q", "k_cache", "block_table", "cache_seqlens")]
    scale = torch.tensor(0.5) if dtype in BYTE_TYPES else None
    torch.library.opcheck(torch.ops.dsm.mla_decode.default, (*tensors, 0.3, True, scale, False, 6))
    out = torch.empty(2, 2, 4, 6, dtype=inputs["q"].dtype)
    torch.library.opcheck(torch.ops.dsm.mla_decode_out.default, (*tensors, 0.3, True, scale, False, out))

    def f(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return dsm.ops.mla_decode(*tensors, 6, causal=True, k_scale=scale)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*tensors), f(*tensors), strict=True):
        assert torch.equal(a, b)
