# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Prefill straight from a cache: sparse_mla_decode of one request with thousands of positions."""

from __future__ import annotations

import pytest
import torch
from cache_layouts import Pool, of_rows
from calls import Arguments, forced
from hostile import CUDA, HOPPER

import ds_flashdmla_moe as dsm
from tolerance import assert_close

pytestmark = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")

SAMPLE = [0, 1, 131, 132, 2047, 4094, 4095]
SPARE_BYTES = 64 << 20  # what a call may take beside its results


def truth(q: torch.Tensor, pool: Pool, rows: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One position with all its heads, in float64."""
    keys = pool.values.to(CUDA)[rows[(rows >= 0) & (rows < len(pool.values))].long()]
    scores = q.double() @ keys.mT * scale
    return scores.softmax(-1) @ keys[:, :512], scores.logsumexp(-1)


@pytest.mark.parametrize(
    ("row_bytes", "h_q", "topk"), [(656, 128, 2048), (656, 16, 2048), (584, 64, 512), (584, 128, 512), (1152, 64, 2048)]
)
def test_thousands_of_positions(row_bytes: int, h_q: int, topk: int) -> None:
    pool = of_rows(row_bytes, 64, 64)
    width, rows = pool.values.shape[1], len(pool.values)
    q = torch.randn(1, 4096, h_q, width, device=CUDA).bfloat16()
    indices = torch.randint(rows, (1, 4096, topk), device=CUDA, dtype=torch.int32)
    for first, none in ((1, -1), (5, rows), (2, 2**31 - 1), (6, -(2**31))):
        indices[..., first::13] = none
    cache, scale = pool.cache.to(CUDA), width**-0.5 / 4

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with dsm.explain() as choices:
        out, lse = dsm.ops.sparse_mla_decode(q, cache, indices, softmax_scale=scale)
    by = [(choice.operator, choice.implementation) for choice in choices]
    copies = [("kv_gather", "cuda")] if row_bytes != 1152 else []
    prefill = [("sparse_mla_decode", "prefill"), *copies, ("sparse_mla_prefill", "sm90")]
    assert by == ([("sparse_mla_decode", "sm90")] if (row_bytes, h_q) == (656, 16) else prefill)
    results = out.numel() * out.element_size() + lse.numel() * lse.element_size()
    assert torch.cuda.max_memory_allocated() - before < results + SPARE_BYTES

    for position in SAMPLE:
        expected, expected_lse = truth(q[0, position], pool, indices[0, position], scale)
        assert_close(f"out at {position}", out[0, position], expected, rounded_terms=True)
        assert_close(f"lse at {position}", lse[0, :, position], expected_lse, rounded_terms=row_bytes == 656)
    again, lse_again = dsm.ops.sparse_mla_decode(q, cache, indices, softmax_scale=scale)
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)


def short_prompts(requests: int) -> Arguments:
    """Requests with lists of other lengths in two caches."""
    torch.manual_seed(7)
    first, second = of_rows(656, 9, 32).cache.to(CUDA), of_rows(352, 80, 2).cache.to(CUDA)
    return {
        "q": torch.randn(requests, 264, 20, 576, device=CUDA).bfloat16(),
        "k_cache": first,
        "indices": torch.randint(-1, 289, (requests, 264, 70), device=CUDA, dtype=torch.int32),
        "topk_length": torch.arange(60, 60 + requests, device=CUDA, dtype=torch.int32),
        "extra_k_cache": second,
        "extra_indices": torch.randint(-1, 161, (requests, 264, 40), device=CUDA, dtype=torch.int32),
        "extra_topk_length": torch.arange(10, 10 + 8 * requests, 8, device=CUDA, dtype=torch.int32),
        "attn_sink": torch.randn(20, device=CUDA),
    }


def test_requests_do_not_depend_on_each_other() -> None:
    arguments = short_prompts(3)
    with dsm.explain() as choices:
        out, lse = dsm.ops.sparse_mla_decode(**arguments)
    assert choices[0].implementation == "prefill"
    for request in range(3):
        alone = {name: x if "cache" in name or "sink" in name else x[request, None] for name, x in arguments.items()}
        out_alone, lse_alone = dsm.ops.sparse_mla_decode(**alone)
        assert torch.equal(out[request], out_alone[0])
        assert torch.equal(lse[request], lse_alone[0])


def test_by_the_portable_prefill() -> None:
    arguments = short_prompts(2)
    expected = dsm.ops.sparse_mla_decode(**arguments)
    with forced("sparse_mla_prefill", "cuda"):
        results = dsm.ops.sparse_mla_decode(**arguments)
    for name, result, truth_of in zip(("out", "lse"), results, expected, strict=True):
        assert_close(name, result, truth_of.double(), rounded_terms=True)
