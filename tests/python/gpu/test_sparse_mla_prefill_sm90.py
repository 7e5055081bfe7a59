# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Sparse prefill's Hopper implementation: its shapes, lists of any length, and what must not be read."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hostile import CUDA, HOPPER
from torch import Tensor

import ds_flashdmla_moe as dsm
from tolerance import assert_close

pytestmark = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")


class Problem(NamedTuple):
    """Lists of a tensor of keys whose other rows are NaN."""

    q: Tensor
    kv: Tensor
    indices: Tensor
    attn_sink: Tensor | None
    topk_length: Tensor | None

    @staticmethod
    def draw(
        s_q: int, h_q: int, d_qk: int, topk: int, dtype: torch.dtype, *, s_kv: int = 3000, sinks: bool = False
    ) -> Problem:
        generator = torch.Generator(CUDA).manual_seed(s_q + topk)
        q = torch.randn(s_q, h_q, d_qk, generator=generator, device=CUDA).to(dtype) * 2
        kv = torch.randn(s_kv, 1, d_qk, generator=generator, device=CUDA).to(dtype)
        indices = torch.randint(s_kv // 2, (s_q, 1, topk), generator=generator, device=CUDA, dtype=torch.int32)
        kv[s_kv // 2 :] = math.nan
        for first, none in ((1, -1), (5, s_kv), (2, 2**31 - 1), (6, -(2**31))):
            indices[..., first::13] = none
        if not sinks:
            return Problem(q, kv, indices, None, None)
        sink = torch.randn(h_q, generator=generator, device=CUDA)
        sink[0], sink[-1] = math.inf, -math.inf
        lengths = torch.arange(s_q, dtype=torch.int32, device=CUDA) * 37 % (topk + 1)
        return Problem(q, kv, indices, sink, lengths)

    def run(self, **options: Tensor) -> tuple[Tensor, ...]:
        with dsm.explain() as choices:
            results = dsm.ops.sparse_mla_prefill(
                self.q, self.kv, self.indices, attn_sink=self.attn_sink, topk_length=self.topk_length, **options
            )
        assert [choice.implementation for choice in choices] == ["sm90"]
        return results

    def truth(self) -> tuple[Tensor, Tensor, Tensor]:
        s_q, h_q, d_qk = self.q.shape
        out = torch.zeros(s_q, h_q, 512, dtype=torch.float64, device=CUDA)
        top, lse = torch.full_like(out[..., 0], -math.inf), torch.full_like(out[..., 0], math.inf)
        for query in range(s_q):
            rows = self.indices[query, 0]
            if self.topk_length is not None:
                rows = rows[: int(self.topk_length[query])]
            rows = rows[(rows >= 0) & (rows < self.kv.shape[0])]
            if len(rows) == 0:
                continue
            keys = self.kv[rows, 0].double()
            scores = self.q[query].double() @ keys.mT * d_qk**-0.5
            top[query], lse[query] = scores.amax(-1), scores.logsumexp(-1)
            total = lse[query] if self.attn_sink is None else torch.logaddexp(lse[query], self.attn_sink.double())
            out[query] = (scores - total[:, None]).exp() @ keys[:, :512]
        return out, top, lse

    def check(self, results: tuple[Tensor, ...]) -> None:
        out, top, lse = self.truth()
        # The weights are rounded to the values' dtype before they are multiplied.
        assert_close("out", results[0], out, rounded_terms=True)
        assert_close("max_logits", results[1], top)
        assert_close("lse", results[2], lse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d_qk", [512, 576])
@pytest.mark.parametrize(
    ("s_q", "h_q", "topk"),
    [
        (1, 1, 1),
        (3, 16, 64),
        (300, 16, 512),
        (150, 9, 640),
        (2, 64, 127),
        (300, 64, 512),
        (150, 128, 640),
        (5, 17, 129),
        (9, 200, 128),
        (3, 8, 0),
    ],
)
@pytest.mark.parametrize("sinks", [False, True])
def test_agrees_with_float64(s_q: int, h_q: int, topk: int, d_qk: int, dtype: torch.dtype, sinks: bool) -> None:
    problem = Problem.draw(s_q, h_q, d_qk, topk, dtype, sinks=sinks)
    results = problem.run()
    problem.check(results)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(results, problem.run(), strict=True))


@pytest.mark.parametrize("h_q", [16, 64])
def test_scores_that_keep_rising(h_q: int) -> None:
    """Every block has a larger score than all before: the output is rescaled again and again."""
    problem = Problem.draw(4, h_q, 576, 1024, torch.bfloat16)
    kv = problem.kv.clone()
    rising = torch.linspace(0.1, 12, 1500, device=CUDA)[:, None, None]
    kv[:1500] = problem.q[0, 0] * rising / 24
    problem = problem._replace(kv=kv, indices=problem.indices.sort(-1).values)
    problem.check(problem.run())


@pytest.mark.parametrize("h_q", [10, 64])
def test_rows_any_distance_apart(h_q: int) -> None:
    problem = Problem.draw(20, h_q, 576, 300, torch.bfloat16)
    expected = problem.run()

    def spread(tensor: Tensor) -> Tensor:
        return torch.cat((tensor, torch.full_like(tensor, math.nan)), -1)[..., : tensor.shape[-1]]

    out = torch.empty(20, h_q, 1024, dtype=torch.bfloat16, device=CUDA)[..., :512]
    results = problem._replace(q=spread(problem.q), kv=spread(problem.kv)).run(out=out)
    assert all(torch.equal(a, b) for a, b in zip(expected, results, strict=True))
