# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Every implementation row on CUDA: right beside garbage, the same bits always, on any stream, in any graph."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from calls import CALLS, Call, Results, forced, on_gpu, same_bits
from hostile import CUDA, HALF, HOPPER, INT_MAX, INT_MIN, int32
from torch import Tensor

import ds_flashdmla_moe as dsm
from ds_flashdmla_moe import _library
from tolerance import assert_close

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ON_HOPPER = ("prefill", "sm90")


def rows_of(calls: Sequence[Call]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("call", "row"),
        [
            pytest.param(
                call,
                row,
                id=f"{call.operator}-{call.label}-{row}",
                marks=pytest.mark.skipif(row in ON_HOPPER and not HOPPER, reason="needs a Hopper GPU"),
            )
            for call in calls
            for row in call.rows
        ],
    )


EVERY = rows_of(CALLS)
ATTENTION = rows_of([call for call in CALLS if call.operator.startswith(("mla_decode", "sparse"))])


def test_every_row_has_a_call() -> None:
    operators = {call.operator for call in CALLS}
    rows = {
        (entry["name"], row["name"])
        for entry in _library.operators()
        if entry["name"] in operators
        for row in entry["implementations"]
        if row["built"] and row["name"] != "cpu"
    }
    assert rows == {(call.operator, row) for call in CALLS for row in call.rows}


@pytest.mark.usefixtures("poisoned_memory")
@EVERY
def test_agrees_with_the_cpu(call: Call, row: str) -> None:
    for seed in (0, 1):
        arguments = call.arguments(seed)
        with forced(call.operator, row):
            results = call.run(**on_gpu(arguments))
        truth = call.truth(arguments)
        assert len(results) == len(truth)
        for i, (result, expected) in enumerate(zip(results, truth, strict=True)):
            if call.exact:
                torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=0, equal_nan=True)
            else:
                rounded = row in ON_HOPPER or (call.operator.startswith(("mla", "sparse_mla")) and result.dtype in HALF)
                assert_close(f"result {i}", result.cpu(), expected, rounded_terms=rounded)


@ATTENTION
def test_writes_into_strided_memory_and_nowhere_else(call: Call, row: str) -> None:
    arguments = on_gpu(call.arguments(0))
    with forced(call.operator, row):
        expected = call.run(**arguments)
        *outer, d_v = expected[0].shape
        memory = torch.full((*outer, d_v + 64), math.nan, dtype=expected[0].dtype, device=CUDA)
        results = call.run(**arguments, out=memory[..., 32 : 32 + d_v])
    assert same_bits(expected, results)
    assert memory[..., :32].isnan().all()
    assert memory[..., 32 + d_v :].isnan().all()


@EVERY
def test_ten_runs_beside_a_busy_stream_give_the_same_bits(call: Call, row: str) -> None:
    arguments = on_gpu(call.arguments(2))
    busy, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device=CUDA)
    with forced(call.operator, row):
        first = call.run(**arguments)
        torch.cuda.synchronize()
        with torch.cuda.stream(busy):
            for _ in range(30):
                noise = (noise @ noise).clamp(-1, 1)
        again = [call.run(**arguments) for _ in range(9)]
    torch.cuda.synchronize()
    assert all(same_bits(first, results) for results in again)


@EVERY
def test_two_calls_at_once_on_two_streams(call: Call, row: str) -> None:
    """Neither sees the other's workspace."""
    problems = [on_gpu(call.arguments(seed)) for seed in (3, 4)]
    streams = [torch.cuda.Stream() for _ in problems]
    with forced(call.operator, row):
        expected = [call.run(**arguments) for arguments in problems]
        torch.cuda.synchronize()
        results: list[list[Results]] = [[], []]
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(2_000_000)  # until both streams have all their work
                for _ in range(5):
                    results[i].append(call.run(**problems[i]))
    torch.cuda.synchronize()
    for alone, together in zip(expected, results, strict=True):
        assert all(same_bits(alone, one) for one in together)


@EVERY
def test_a_graph_follows_every_argument(call: Call, row: str) -> None:
    """Values, lengths, lists and tables change between replays; the shapes stay."""
    arguments = on_gpu(call.arguments(5))
    with forced(call.operator, row):
        call.run(**arguments)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call.run(**arguments)
        for seed in (6, 7, 8):
            changed = on_gpu(call.arguments(seed))
            for name, value in changed.items():
                if isinstance(value, Tensor):
                    arguments[name].copy_(value)
            graph.replay()
            assert same_bits(call.run(**changed), captured)


# --- what the CPU refuses, but only who reads the tensors can see ---


@pytest.mark.parametrize("row", ["sm90", "cuda"])
def test_lengths_and_pages_that_cannot_be(row: str) -> None:
    """The nearest length counts; pages that are none spoil no other request, and nothing is read through them."""
    if row == "sm90" and not HOPPER:
        pytest.skip("needs a Hopper GPU")
    cache, q = torch.randn(9, 64, 1, 576).bfloat16(), torch.randn(5, 1, 16, 576).bfloat16()
    table = int32([[0, 1], [-1, INT_MAX], [2, 3], [INT_MIN, 9], [4, 5]])
    given, nearest = int32([INT_MAX, 128, 100, 65, INT_MIN]), int32([128, 0, 100, 0, 0])
    with forced("mla_decode", row):
        out, lse = dsm.ops.mla_decode(*(value.to(CUDA) for value in (q, cache, table, given)), 512)
    expected, expected_lse = dsm.ops.mla_decode(q.double(), cache.double(), table, nearest, 512)
    sound = [0, 2, 4]
    assert_close("out", out.cpu()[sound], expected[sound], rounded_terms=True)
    assert_close("lse", lse.cpu()[sound], expected_lse[sound])
    assert out.isfinite().all()


# --- scores beyond the largest float ---

HUGE = 1e30  # whose square float32 does not hold


def attend(operator: str, row: str, q: Tensor, keys: Tensor, count: int) -> Results:
    """Out [h_q, 512] and lse [h_q] of q [h_q, 576] over the first `count` of 64 keys."""
    length = int32([count]).to(CUDA)
    listed = torch.arange(64, device=CUDA).int().view(1, 1, 64)
    with forced(operator, row):
        if operator == "mla_decode":
            table = torch.zeros(1, 1, dtype=torch.int32, device=CUDA)
            out, lse = dsm.ops.mla_decode(q[None, None], keys[None, :, None], table, length, 512)
            return out[0, 0], lse[0, :, 0]
        if operator == "sparse_mla_prefill":
            out, _, lse = dsm.ops.sparse_mla_prefill(q[None], keys[:, None], listed, topk_length=length)
            return out[0], lse[0]
        cache = torch.zeros(1, 64, 1, 656, dtype=torch.uint8, device=CUDA)
        dsm.ops.mla_kv_insert(keys[:, :512], keys[:, 512:], cache, torch.arange(64, device=CUDA), "fp32")
        out, lse = dsm.ops.sparse_mla_decode(q[None, None], cache, listed, topk_length=length)
        return out[0, 0], lse[0, :, 0]


@pytest.mark.parametrize("row", ["sm90", "cuda"])
@pytest.mark.parametrize("operator", ["mla_decode", "sparse_mla_decode", "sparse_mla_prefill"])
def test_infinite_scores(operator: str, row: str) -> None:
    """A score of +inf makes its query NaN; one of -inf is no key; other queries do not notice."""
    if row == "sm90" and not HOPPER:
        pytest.skip("needs a Hopper GPU")
    q, keys = torch.randn(16, 576, device=CUDA).bfloat16(), torch.randn(64, 576, device=CUDA).bfloat16()
    q[:, 0], keys[:, 0] = 0, 0
    keys[5, 0] = HUGE
    clean = attend(operator, row, q, keys, 40)
    others = torch.arange(16, device=CUDA) != 3
    for score in (HUGE, -HUGE):
        q[3] = 0
        q[3, 0] = score
        out, lse = attend(operator, row, q, keys, 40)
        assert torch.equal(out[others], clean[0][others])
        assert torch.equal(lse[others], clean[1][others])
        if score > 0:
            assert out[3].isnan().all()
            assert lse[3].isnan()
        else:
            keep = torch.arange(40, device=CUDA) != 5
            # Coarse, as one cache is FP8.
            assert_close("out", out[3, 1:], keys[:40][keep].double().mean(0)[1:512], rounded_terms=True, scale=4.0)
            assert_close("lse", lse[3], torch.tensor(39.0, device=CUDA).double().log())
    keys[0] = keys[5]
    out, lse = attend(operator, row, q, keys, 1)
    assert not out[3].any()
    assert lse[3] == math.inf
