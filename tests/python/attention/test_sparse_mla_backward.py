# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_mla_truth import SIZES, Problem, any_problem, attention, draw, gradients, largest
from torch import Tensor

from ds_flashdmla_moe.ops import sparse_mla_prefill
from threads import assert_same_bits
from tolerance import FLOATING, assert_close


def differentiate(problem: Problem) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor]:
    """Gradients of q, kv and, where there is one, the sink; out and the gradients of out and lse."""
    inputs = [t.detach().requires_grad_() for t in (problem.q, problem.kv, problem.attn_sink) if t is not None]
    p = problem._replace(**dict(zip(("q", "kv", "attn_sink"), inputs, strict=False)))
    out, _, lse = sparse_mla_prefill(*p.arguments())
    generator = torch.Generator().manual_seed(1)
    dout, dlse = (torch.randn(t.shape, generator=generator).to(t.dtype) for t in (out, lse))
    return torch.autograd.grad((out, lse), inputs, (dout, dlse)), out.detach(), dout, dlse


def check(problem: Problem) -> None:
    found, out, dout, dlse = differentiate(problem)
    truths, terms = gradients(problem, dout, dlse, out)
    for name, result, truth, size in zip(("dq", "dkv", "dattn_sink"), found, truths, terms, strict=False):
        assert_close(name, result, truth, scale=largest(size))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        *SIZES,
        {"s_q": 3, "topk": 300, "s_kv": 700, "d_qk": 300, "d_v": 257},  # beyond one block of every product
        {"s_q": 40, "h_q": 128, "topk": 700, "d_qk": 3, "d_v": 2},  # several blocks of queries
    ],
    ids=str,
)
def test_matches_float64(sizes: dict[str, int], dtype: torch.dtype) -> None:
    for sink, lengths in ((True, True), (False, False)):
        check(draw(**sizes, dtype=dtype, sink=sink, lengths=lengths))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), problem=any_problem(most_keys=120))
def test_matches_float64_for_any_sizes(seed: int, problem: dict[str, Any]) -> None:
    torch.manual_seed(seed)
    check(draw(**problem))


def test_formula_of_gradients_agrees_with_autograd() -> None:
    p = draw(h_q=4, h_kv=2, dtype=torch.float64)
    assert p.attn_sink is not None
    inputs = [t.requires_grad_() for t in (p.q, p.kv, p.attn_sink)]
    out, _, lse, _ = attention(p)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    found, _ = gradients(p, dout, dlse, out)
    for a, b in zip(found, torch.autograd.grad((out, lse), inputs, (dout, dlse)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sink", [False, True])
def test_gradcheck(sink: bool) -> None:
    """Through out and lse, with duplicates, indices that are no row, lengths and a query without a key."""
    p = draw(s_q=4, s_kv=5, h_q=4, h_kv=2, d_qk=5, d_v=3, topk=9, dtype=torch.float64, sink=sink)
    assert p.topk_length is not None
    p.topk_length[:2] = torch.tensor([0, 9])
    p.indices[1, :, 5:] = torch.tensor([3, 3, 0, 3])

    def f(q: Tensor, kv: Tensor, *sinks: Tensor) -> tuple[Tensor, Tensor]:
        given = sinks[0] if sinks else None
        out, _, lse = sparse_mla_prefill(q, kv, p.indices, 0.4, p.d_v, given, p.topk_length)
        return out, lse.clamp_max(100.0)  # queries without a key have lse +inf, and no derivative

    inputs = [t.requires_grad_() for t in (p.q, p.kv, p.attn_sink) if t is not None]
    assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize("only", ["out", "lse"])
def test_gradient_through_one_result(only: str) -> None:
    p = draw(dtype=torch.float64)
    assert p.attn_sink is not None
    inputs = [t.requires_grad_() for t in (p.q, p.kv, p.attn_sink)]
    at = 0 if only == "out" else 2
    keyed = torch.tensor([bool(rows) for *_, rows in p.lists()])
    ours = sparse_mla_prefill(*p.arguments())[at][keyed]
    truth = attention(p)[at][keyed]
    found = torch.autograd.grad(ours.square().sum(), inputs)
    expected = torch.autograd.grad(truth.square().sum(), inputs, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-11, atol=1e-11)


def test_infinite_sinks() -> None:
    p = draw(h_q=3, sink=False, lengths=False)
    plain, *_ = differentiate(p)
    dq, dkv, dsink = differentiate(p._replace(attn_sink=torch.tensor([-torch.inf, torch.inf, -1e30])))[0]
    assert torch.equal(dq[:, ::2], plain[0][:, ::2])
    assert dq.isfinite().all()
    assert dkv.isfinite().all()
    assert torch.equal(dsink, torch.zeros(3))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_rows_that_no_query_selects_are_never_read(dtype: torch.dtype) -> None:
    p = draw(dtype=dtype)
    clean, *_ = differentiate(p)
    used = {row for *_, rows in p.lists() for row in rows}
    unused = [row for row in range(p.kv.shape[0]) if row not in used]
    p.kv[unused] = float("nan")
    found, *_ = differentiate(p)
    assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True))
    assert not found[1][unused].any()


def test_a_poisoned_query_reaches_only_the_rows_it_selects() -> None:
    p = draw(s_kv=60)
    clean, *_ = differentiate(p)
    p.q[3] = float("nan")
    found, *_ = differentiate(p)
    hit = torch.zeros(60, dtype=torch.bool)
    hit[next(rows for i, *_, rows in p.lists() if i == 3)] = True
    assert hit.any()
    assert found[1][hit].isnan().all()
    assert torch.equal(found[1][~hit], clean[1][~hit])
    rest = torch.arange(5) != 3
    assert torch.equal(found[0][rest], clean[0][rest])


def test_views() -> None:
    p = draw(s_q=6, s_kv=20, h_q=4, h_kv=2)
    expected, *_ = differentiate(p)
    q = torch.randn(4, 6, 33).transpose(0, 1)[..., 5:25].copy_(p.q)
    kv = torch.randn(2, 20, 20).transpose(0, 1).copy_(p.kv)
    found, *_ = differentiate(p._replace(q=q, kv=kv))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # A sum's gradient is expanded: its elements share memory.
    q.requires_grad_()
    one = torch.autograd.grad(sparse_mla_prefill(*p._replace(q=q).arguments())[0].sum(), q)[0]
    two = torch.autograd.grad(
        sparse_mla_prefill(*p._replace(q=q).arguments())[0],
        q,
        torch.ones(6, 4, p.d_v),
    )[0]
    assert torch.equal(one, two)


def test_same_bits_for_any_number_of_threads() -> None:
    problems = [
        draw(s_q=70, h_q=8, h_kv=2, topk=40, d_qk=70, d_v=40),
        draw(s_q=1, h_q=130, topk=300, s_kv=500, d_qk=80, d_v=64, dtype=torch.bfloat16),
        draw(s_q=40, h_q=128, topk=700, d_qk=3, d_v=2),
    ]
    assert_same_bits(lambda: [gradient for p in problems for gradient in differentiate(p)[0]])


def test_bad_arguments_are_refused() -> None:
    p = draw(h_q=4, h_kv=2)
    names = ("dout", "dlse", "q", "kv", "indices", "attn_sink", "topk_length", "out", "lse", "scale")
    out, lse = torch.randn(5, 4, 12), torch.randn(5, 4)
    good = dict(
        zip(names, (out, lse, p.q, p.kv, p.indices, p.attn_sink, p.topk_length, out, lse, p.scale), strict=True)
    )
    bad = {
        "q must be": {"q": p.q[0]},
        r"dout must be \[s_q, h_q, d_v\] = \[5, 4, 12\]": {"dout": out[..., 1:]},
        "out must be .* float32, got .* float64": {"out": out.double()},
        "lse must be contiguous": {"lse": lse.T.contiguous().T},
        r"dlse must be \[s_q, h_q\]": {"dlse": lse[1:]},
        "d_v must be at most d_qk = 20, got 21": {"out": torch.zeros(5, 4, 21)},
        "indices must be .* int32": {"indices": p.indices.long()},
    }
    torch.ops.dsm.sparse_mla_backward(*good.values())
    for message, change in bad.items():
        with pytest.raises(ValueError, match=message):
            torch.ops.dsm.sparse_mla_backward(*{**good, **change}.values())


def test_statistics_are_not_differentiable_and_second_derivatives_refused() -> None:
    p = draw()
    q = p.q.requires_grad_()
    out, max_logits, _, probs = sparse_mla_prefill(*p.arguments(), return_key_probs=True)
    assert not max_logits.requires_grad
    assert not probs.requires_grad
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_opcheck() -> None:
    p = draw()
    out, _, lse = sparse_mla_prefill(*p.arguments())
    for sink in (p.attn_sink, None):
        arguments = (out, None, p.q, p.kv, p.indices, sink, p.topk_length, out, lse, p.scale)
        torch.library.opcheck(torch.ops.dsm.sparse_mla_backward.default, arguments)


def test_compile_fullgraph() -> None:
    p = draw()
    assert p.attn_sink is not None
    inputs = [t.requires_grad_() for t in (p.q, p.kv, p.attn_sink)]

    def f(p: Problem) -> Tensor:
        out, _, lse = sparse_mla_prefill(*p.arguments())
        return out.square().sum() + lse.clamp_max(100.0).sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(p), inputs), torch.autograd.grad(f(p), inputs), strict=True):
        assert torch.equal(a, b)
