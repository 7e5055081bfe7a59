# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_mla_truth import SIZES, Problem, any_problem, attention, draw
from torch import Tensor

from ds_flashdmla_moe.ops import sparse_mla_prefill
from threads import assert_same_bits
from tolerance import FLOATING, assert_close

NAMES = ("out", "max_logits", "lse", "key_probs")


def run(problem: Problem) -> tuple[Tensor, ...]:
    return sparse_mla_prefill(*problem.arguments(), return_key_probs=True)


def check(problem: Problem) -> None:
    results = run(problem)
    wide = torch.promote_types(problem.q.dtype, torch.float32)
    assert [t.dtype for t in results] == [problem.q.dtype, wide, wide, wide]
    for name, result, truth in zip(NAMES, results, attention(problem), strict=True):
        assert_close(name, result, truth)
    fewer = sparse_mla_prefill(*problem.arguments())
    assert len(fewer) == 3
    assert all(torch.equal(a, b) for a, b in zip(fewer, results[:3], strict=True))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        *SIZES,
        {"s_q": 1, "topk": 300, "s_kv": 700, "d_qk": 300, "d_v": 257},
    ],  # the last beyond one block of every product
    ids=str,
)
def test_matches_float64(sizes: dict[str, int], dtype: torch.dtype) -> None:
    for sink, lengths in ((True, True), (False, False)):
        check(draw(**sizes, dtype=dtype, sink=sink, lengths=lengths))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), problem=any_problem(most_keys=80))
def test_matches_float64_for_any_sizes(seed: int, problem: dict[str, Any]) -> None:
    torch.manual_seed(seed)
    check(draw(**problem))


def test_sum_of_many_keys() -> None:
    check(draw(s_q=1, s_kv=9000, topk=9000, d_qk=4, d_v=4, lengths=False))


def test_closed_forms() -> None:
    q, kv = torch.zeros(1, 2, 3), torch.tensor([[[1.0, 2, 9]], [[3, 4, 9]]])
    # Equal scores: the mean, in which a duplicate counts twice; a sink of log n is as much as n more keys.
    indices = torch.tensor([[[0, 1, 1, -1]]], dtype=torch.int32)
    out, max_logits, lse, probs = sparse_mla_prefill(
        q, kv, indices, 1.0, 2, torch.tensor([0.0, 3.0]).log(), return_key_probs=True
    )
    torch.testing.assert_close(out, torch.tensor([[[7 / 3, 10 / 3], [7 / 6, 10 / 6]]]))
    torch.testing.assert_close(lse, torch.full((1, 2), 3.0).log())
    assert torch.equal(max_logits, torch.zeros(1, 2))
    torch.testing.assert_close(probs, torch.tensor([[[0.5, 0.5, 0.5, 0]]]))


def test_golden_sink() -> None:
    """DeepSeek-V4: scores 1 and 2 with a sink of 0.5; the rest of the weight, 0.1402444, is discarded."""
    q, kv = torch.ones(1, 1, 1), torch.tensor([[[1.0]], [[2.0]]])
    indices = torch.tensor([[[0, 1]]], dtype=torch.int32)
    out, _, _, probs = sparse_mla_prefill(q, kv, indices, 1.0, 1, torch.tensor([0.5]), return_key_probs=True)
    torch.testing.assert_close(probs, torch.tensor([[[0.2312239, 0.6285317]]]), rtol=0, atol=1e-7)
    torch.testing.assert_close(out, torch.tensor([[[0.2312239 + 2 * 0.6285317]]]), rtol=0, atol=2e-7)


def test_queries_without_a_key_and_infinite_sinks() -> None:
    q, kv = torch.randn(3, 3, 4), torch.randn(6, 1, 4)
    indices = torch.tensor([[[0, 1]], [[-1, 6]], [[2, 3]]], dtype=torch.int32)
    lengths = torch.tensor([2, 2, 0], dtype=torch.int32)
    sink = torch.tensor([-torch.inf, torch.inf, 1e30])
    out, max_logits, lse, probs = sparse_mla_prefill(q, kv, indices, 0.5, 4, sink, lengths, return_key_probs=True)
    plain, _, plain_lse = sparse_mla_prefill(q, kv, indices, 0.5, 4, None, lengths)
    assert torch.equal(out[0, 0], plain[0, 0])
    assert not out[0, 1:].any()
    assert torch.equal(lse, plain_lse)
    assert not out[1:].any()
    assert not probs[1:].any()
    assert (lse[1:] == torch.inf).all()
    assert (max_logits[1:] == -torch.inf).all()
    hidden = sparse_mla_prefill(q[:1], torch.full((6, 1, 4), -torch.inf) * q[:1, :1].sign(), indices[:1], 0.5, 0)
    assert hidden[1][0, 0] == -torch.inf
    assert hidden[2][0, 0] == torch.inf


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_rows_that_no_query_selects_are_never_read(dtype: torch.dtype) -> None:
    problem = draw(dtype=dtype)
    clean = run(problem)
    used = {row for *_, rows in problem.lists() for row in rows}
    unused = [row for row in range(problem.kv.shape[0]) if row not in used]
    assert unused
    problem.kv[unused] = float("nan")
    for a, b in zip(run(problem), clean, strict=True):
        assert torch.equal(a, b)


def test_a_poisoned_row_reaches_only_the_queries_that_select_it() -> None:
    problem = draw(s_q=40)
    clean = run(problem)
    problem.kv[7] = float("nan")
    results = run(problem)
    hit = torch.tensor([7 in rows for *_, rows in problem.lists()])
    assert hit.any()
    assert not hit.all()
    assert results[0][hit].isnan().all()
    for a, b in zip(results, clean, strict=True):
        assert torch.equal(a[~hit], b[~hit])


def test_views_and_given_output() -> None:
    p = draw(s_q=6, s_kv=20, h_q=4, h_kv=2)
    expected = run(p)
    q = torch.randn(4, 6, 33).transpose(0, 1)[..., 5:25].copy_(p.q)
    kv = torch.randn(2, 20, 20).transpose(0, 1).copy_(p.kv)
    indices = torch.zeros(6, 2, 30, dtype=torch.int32)[..., 3:12].copy_(p.indices)
    assert p.attn_sink is not None
    assert p.topk_length is not None
    sink, lengths = torch.zeros(8)[::2].copy_(p.attn_sink), torch.zeros(12, dtype=torch.int32)[::2]
    strided = Problem(q, kv, indices, p.d_v, p.scale, sink, lengths.copy_(p.topk_length))
    apart = Problem(q.mT.contiguous().mT, kv, indices.mT.contiguous().mT, *strided[3:])
    for problem in (strided, apart):
        for a, b in zip(run(problem), expected, strict=True):
            assert torch.equal(a, b)
    wide = torch.full((4, 6, 2 * p.d_v), float("nan"))
    out = wide.transpose(0, 1)[..., : p.d_v]
    results = sparse_mla_prefill(*p.arguments(), out=out)
    assert results[0] is out
    assert all(torch.equal(a, b) for a, b in zip(results, expected[:3], strict=True))
    assert wide[..., p.d_v :].isnan().all()


def test_same_bits_for_any_number_of_threads() -> None:
    many, one = draw(s_q=70, h_q=8, topk=40), draw(s_q=1, h_q=130, topk=300, s_kv=500, d_qk=80, d_v=64)
    assert_same_bits(lambda: [*run(many), *run(one)])


def test_bad_arguments_are_refused() -> None:
    p = draw(h_q=4, h_kv=2)
    bad = {
        "q must be": {"q": p.q[0]},
        r"kv must be \[s_kv, h_kv, d_qk\]": {"kv": p.kv[..., 1:]},
        "kv must be .* float32, got .* float16": {"kv": p.kv.half()},
        "h_q must be a multiple of h_kv = 2, got 3": {"q": p.q[:, :3]},
        r"indices must be \[s_q, h_kv, topk\]": {"indices": p.indices[:, :1]},
        "indices must be .* int32, got .* int64": {"indices": p.indices.long()},
        "indices must be": {"indices": p.indices[0]},
        "d_v must be at most d_qk = 20, got 21": {"d_v": 21},
        "d_v must be at least 0, got -1": {"d_v": -1},
        r"attn_sink must be \[h_q\]": {"attn_sink": torch.zeros(3)},
        "attn_sink must be .* float32, got .* float64": {"attn_sink": torch.zeros(4).double()},
        r"topk_length must be \[s_q\]": {"topk_length": torch.zeros(4, dtype=torch.int32)},
        "topk_length must be .* int32": {"topk_length": torch.zeros(5)},
        "softmax_scale must be finite": {"scale": float("inf")},
    }
    for message, change in bad.items():
        with pytest.raises(ValueError, match=message):
            run(p._replace(**change))
    out = torch.full((5, 4, 11), 7.0)
    with pytest.raises(ValueError, match=r"out must be \[s_q, h_q, d_v = 12\]"):
        sparse_mla_prefill(*p.arguments(), out=out)
    with pytest.raises(ValueError, match="indices must be"):
        sparse_mla_prefill(*p._replace(indices=p.indices.long(), d_v=11).arguments(), out=out)
    assert (out == 7).all()
    with pytest.raises(ValueError, match="out must be None where gradients are recorded"):
        sparse_mla_prefill(*p._replace(q=p.q.requires_grad_(), d_v=11).arguments(), out=out)


@pytest.mark.parametrize("return_key_probs", [False, True])
def test_opcheck(return_key_probs: bool) -> None:
    p = draw()
    inputs = (p.q, p.kv, p.indices, p.attn_sink, p.topk_length, p.scale)
    torch.library.opcheck(
        torch.ops.dsm.sparse_mla_prefill_out.default, (*inputs, return_key_probs, torch.zeros(5, 4, 12))
    )
    inputs = (p.q.requires_grad_(), p.kv.requires_grad_(), *inputs[2:])
    torch.library.opcheck(torch.ops.dsm.sparse_mla_prefill.default, (*inputs, p.d_v, return_key_probs))


def test_compile_fullgraph() -> None:
    p = draw()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(p), run(p), strict=True))
