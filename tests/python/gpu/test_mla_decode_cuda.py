# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Dense decoding on Hopper against float64, with lengths around the blocks of 64 keys and requests in several parts."""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import pytest
import torch
from hostile import CUDA, HOPPER
from torch import Tensor

import ds_flashdmla_moe as dsm

pytestmark = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")

# Probabilities are rounded to 16 bits before they meet the values: a relative error of half an ulp in each.
RELATIVE = {torch.bfloat16: 4e-3, torch.float16: 5e-4}


class Case(NamedTuple):
    lengths: list[int]
    s_q: int
    h_q: int
    page_size: int = 64
    causal: bool = True


def random_lengths(count: int, most: int) -> list[int]:
    draw = random.Random(count)
    return [draw.randrange(most) for _ in range(count)]


CASES = [
    Case([64], 1, 64, causal=False),
    Case([1], 1, 16),
    Case([4096], 1, 128),  # every part has a piece of the one request
    Case([100, 0, 1, 63, 64, 65, 127, 128, 129, 4000], 1, 128),
    Case([100, 0, 1, 63, 64, 65, 127, 128, 129, 4000], 2, 128),
    Case([5, 0, 1, 2, 3, 200], 4, 20, 128),  # queries without keys; heads that do not fill a tile
    Case([0, 0, 0], 1, 16),
    Case(random_lengths(200, 3000), 1, 16),
    Case(random_lengths(300, 300), 3, 40, 256),
    Case([64] * 300, 1, 128),  # one block of keys each
    Case([8192] * 4, 1, 128),
    Case([3000, 17], 100, 128),  # more tiles of queries than multiprocessors
]


def problem(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Arguments whose unused rows hold NaN and whose table holds garbage beyond the lengths."""
    pages_of = [-(-length // case.page_size) for length in case.lengths]
    pages = sum(pages_of) + 1
    cache = torch.randn(pages, case.page_size, 1, 576, dtype=dtype, device=CUDA)
    cache[pages - 1] = math.nan
    order = torch.randperm(pages - 1, dtype=torch.int32)
    table = torch.full((len(case.lengths), max(pages_of) + 2), 2**31 - 1, dtype=torch.int32)
    for b, length in enumerate(case.lengths):
        table[b, : pages_of[b]], order = order[: pages_of[b]], order[pages_of[b] :]
        if length % case.page_size:
            cache[table[b, length // case.page_size], length % case.page_size :] = math.nan
    return {
        "q": torch.randn(len(case.lengths), case.s_q, case.h_q, 576, dtype=dtype, device=CUDA),
        "k_cache": cache,
        "block_table": table.to(CUDA),
        "cache_seqlens": torch.tensor(case.lengths, dtype=torch.int32, device=CUDA),
    }


def truth(case: Case, q: Tensor, k_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.zeros(*q.shape[:3], 512, dtype=torch.float64, device=CUDA)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), math.inf, dtype=torch.float64, device=CUDA)
    for b, length in enumerate(cache_seqlens.tolist()):
        pages = block_table[b, : -(-length // case.page_size)].long()
        keys = k_cache[pages].reshape(-1, 576)[:length].double()
        scores = torch.einsum("ihd,jd->ihj", q[b].double(), keys) * 576**-0.5
        if case.causal:
            last = torch.arange(case.s_q, device=CUDA) + length - case.s_q
            scores.masked_fill_((torch.arange(length, device=CUDA) > last[:, None])[:, None], -math.inf)
        sums = scores.logsumexp(-1)
        lse[b] = sums.where(sums > -math.inf, math.inf).T
        out[b] = torch.einsum("ihj,jd->ihd", (scores - lse[b].T[..., None]).exp(), keys[:, :512])
    return out, lse


@pytest.mark.parametrize("dtype", RELATIVE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{len(case.lengths)}x{case.s_q}x{case.h_q}")
def test_decode_agrees_with_float64(case: Case, dtype: torch.dtype) -> None:
    inputs = problem(case, dtype)
    out, lse = dsm.ops.mla_decode(**inputs, d_v=512, causal=case.causal)
    true_out, true_lse = truth(case, **inputs)
    wrong = out.double() - true_out
    error = float(wrong.norm() / true_out.norm().clamp(min=1e-30))
    worst = float((wrong.norm(dim=-1) / true_out.norm(dim=-1).clamp(min=1e-30)).max())
    print(f"relative error {error:.2e} of {RELATIVE[dtype]:.0e}, of the worst query {worst:.2e}")
    assert error < RELATIVE[dtype]
    assert worst < 4 * RELATIVE[dtype]  # outputs of many keys are small: one that is wrong hardly shows in all
    assert torch.equal(lse.isinf(), true_lse.isinf())
    torch.testing.assert_close(lse.double(), true_lse, rtol=0, atol=2e-5)
    for _ in range(3):
        again, lse_again = dsm.ops.mla_decode(**inputs, d_v=512, causal=case.causal)
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)


@pytest.mark.parametrize("h_q", [64, 128])
def test_the_largest_weight_is_exact(h_q: int) -> None:
    """Where one key, later than the others, has most of the weight, rounding the output is nearly all of the error."""
    case = Case([70] * 20, 1, h_q)
    inputs = problem(case, torch.bfloat16)
    second = inputs["k_cache"][inputs["block_table"][:, 1].long(), :6, 0]
    inputs["q"] = 0.23 * second[:, torch.arange(h_q, device=CUDA) % 6].unsqueeze(1)
    # Batch-invariant, so that both blocks of keys are one piece.
    out, _ = dsm.ops.mla_decode(**inputs, d_v=512, causal=True, batch_invariant=True)
    true_out, _ = truth(case, **inputs)
    error, rounding = (float((x.double() - true_out).norm()) for x in (out, true_out.bfloat16()))
    print(f"{error / rounding:.3f} of the error of rounding the output")
    assert error < 1.05 * rounding


def test_a_graph_follows_the_lengths() -> None:
    case = Case([700, 3000, 64], 1, 128)
    inputs = problem(case, torch.bfloat16)
    dsm.ops.mla_decode(**inputs, d_v=512, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = dsm.ops.mla_decode(**inputs, d_v=512, causal=True)
    for lengths in ([1, 2999, 0], [700, 65, 64], [0, 0, 0]):
        inputs["cache_seqlens"].copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        now, lse_now = dsm.ops.mla_decode(**inputs, d_v=512, causal=True)
        assert torch.equal(out, now)
        assert torch.equal(lse, lse_now)
        assert not out.isnan().any()
