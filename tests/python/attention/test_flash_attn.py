# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch
from attention_truth import attention, attention_gradients, largest
from torch import Tensor

import ds_flashdmla_moe as dsm
from tolerance import FLOATING, assert_close


class Case(NamedTuple):
    batch: int
    s_q: int
    s_kv: int
    h_q: int
    h_kv: int
    d_qk: int
    d_v: int


CASES = [
    Case(1, 1, 1, 1, 1, 1, 1),
    Case(2, 5, 7, 4, 2, 4, 3),
    Case(1, 127, 129, 2, 1, 32, 32),  # one off the tiles of 128
    Case(1, 129, 257, 1, 1, 16, 24),
    Case(1, 63, 513, 1, 1, 16, 8),
    Case(2, 64, 65, 2, 2, 64, 64),
    Case(1, 65, 128, 3, 1, 128, 128),
    Case(1, 70, 70, 2, 2, 192, 128),
    Case(1, 1, 4200, 4, 2, 16, 16),  # decoding: several wide tiles
    Case(1, 3, 16500, 2, 1, 8, 8),  # decoding over parts of the keys
    Case(1, 3, 600, 2, 1, 33, 17),
    Case(1, 10, 4, 2, 1, 8, 8),  # causal: the first six queries have no key
    Case(1, 200, 70, 1, 1, 8, 8),
    Case(2, 4, 0, 2, 1, 8, 8),
    Case(2, 0, 4, 2, 1, 8, 8),
    Case(0, 3, 3, 2, 1, 8, 8),
    Case(1, 3, 3, 0, 1, 8, 8),
]


def draw(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, whose scores reach about ±10 at the default scale."""
    q = torch.randn(case.batch, case.s_q, case.h_q, case.d_qk) * 3
    k = torch.randn(case.batch, case.s_kv, case.h_kv, case.d_qk)
    v = torch.randn(case.batch, case.s_kv, case.h_kv, case.d_v)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def check_against_truth(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor, causal: bool, scale: float
) -> None:
    """Compares out, lse and the gradients on q, k and v with the formula. Tensors are [batch, rows, heads, d]."""
    heads_first = [t.detach().transpose(1, 2) for t in (q, k, v)]
    expected, expected_lse = attention(*heads_first, scale, causal)
    assert_close("out", out, expected.transpose(1, 2))
    assert_close("lse", lse, expected_lse)
    stored = out.detach().transpose(1, 2)
    truth = attention_gradients(dout.transpose(1, 2), dlse, *heads_first, stored, scale, causal)
    for name, t, gradient, terms in zip("qkv", (q, k, v), truth[:3], truth[3:], strict=True):
        assert t.grad is not None
        assert_close(f"d{name}", t.grad, gradient.transpose(1, 2), scale=largest(terms))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_forward_and_backward_match_float64(case: Case, causal: bool, dtype: torch.dtype) -> None:
    q, k, v = (t.requires_grad_() for t in draw(case, dtype))
    out, lse = dsm.ops.flash_attn(q, k, v, causal=causal)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    dout, dlse = torch.randn(out.shape).to(dtype), torch.randn(lse.shape).to(lse.dtype)
    torch.autograd.backward((out, lse), (dout, dlse))
    check_against_truth(q, k, v, out, lse, dout, dlse, causal, case.d_qk**-0.5)


def test_formula_of_gradients_agrees_with_autograd() -> None:
    q, k, v = (t.transpose(1, 2).detach().requires_grad_() for t in draw(Case(2, 9, 11, 4, 2, 5, 3), torch.float64))
    out, lse = attention(q, k, v, 0.3, True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    autograd = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    formula = attention_gradients(dout, dlse, q.detach(), k.detach(), v.detach(), out.detach(), 0.3, True)
    for a, b in zip(autograd, formula[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("case", [Case(2, 3, 5, 4, 2, 3, 2), Case(1, 5, 3, 2, 1, 2, 3)], ids=["wide", "tall"])
def test_gradcheck(case: Case, causal: bool) -> None:
    inputs = [t.requires_grad_() for t in draw(case, torch.float64)]

    def f(*t: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = dsm.ops.flash_attn(*t, softmax_scale=0.4, causal=causal)
        return out, lse.clamp_min(-100.0)  # rows without keys have lse -inf, and no derivative

    assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize("seed", range(16))
def test_fuzz(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    h_kv = rng.choice([1, 2, 3])
    lengths = [0, 1, 2, 17, 63, 64, 100, 128, 190, 260]
    case = Case(
        rng.choice([1, 2]), rng.choice(lengths), rng.choice(lengths), h_kv * rng.choice([1, 2, 5]), h_kv,
        rng.choice([1, 8, 40, 80]), rng.choice([1, 16, 40, 72]),
    )  # fmt: skip
    dtype, causal, scale = rng.choice(FLOATING), rng.random() < 0.5, rng.choice([0.05, 0.3, -0.2, 0.0])
    print(seed, case, dtype, causal, scale)
    q, k, v = draw(case, dtype)
    if rng.random() < 0.5:  # [batch, heads, rows, d] in memory, with gaps between rows
        q, k, v = (
            torch.cat([t, t], -1).transpose(1, 2).contiguous().transpose(1, 2)[..., : t.shape[-1]] for t in (q, k, v)
        )
    for t in (q, k, v):
        t.requires_grad_()
    out, lse = dsm.ops.flash_attn(q, k, v, softmax_scale=scale, causal=causal)
    dout, dlse = torch.randn(out.shape).to(dtype), torch.randn(lse.shape).to(lse.dtype)
    torch.autograd.backward((out, lse), (dout, dlse))
    check_against_truth(q, k, v, out, lse, dout, dlse, causal, scale)


def test_views_are_read_in_place() -> None:
    wide = torch.randn(2, 70, 3, 40)
    for view in (
        wide[..., 3:19],
        wide.transpose(1, 2)[:, :60].transpose(1, 2)[..., :16],
        wide[:, :, :1].expand(2, 70, 3, 40),
    ):
        out, lse = dsm.ops.flash_attn(view, view, view, causal=True)
        expected, expected_lse = dsm.ops.flash_attn(
            *[view.clone(memory_format=torch.contiguous_format)] * 3, causal=True
        )
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)
    apart = torch.randn(2, 70, 16, 3).transpose(2, 3)  # the last dimension is not adjacent: copied
    assert torch.equal(dsm.ops.flash_attn(apart, apart, apart)[0], dsm.ops.flash_attn(*[apart.contiguous()] * 3)[0])


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_a_query_does_not_see_never_counts(poison: float, dtype: torch.dtype) -> None:
    """A poisoned key must leave alone the queries before it, a poisoned query the keys after it."""
    case, at = Case(1, 150, 160, 2, 1, 16, 16), 77
    offset = case.s_kv - case.s_q
    clean = draw(case, dtype)
    dout = torch.randn(case.batch, case.s_q, case.h_q, case.d_v).to(dtype)

    def run(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        out, lse = dsm.ops.flash_attn(*inputs, causal=True)
        return out, lse, *torch.autograd.grad(out, inputs, dout)

    expected = run(*clean, dout)
    q, k, v = (t.clone() for t in clean)
    k[:, at + offset], v[:, at + offset] = poison, poison
    out, lse, dq, _, _ = run(q, k, v, dout)
    assert torch.equal(out[:, :at], expected[0][:, :at])
    assert torch.equal(lse[..., :at], expected[1][..., :at])
    assert torch.equal(dq[:, :at], expected[2][:, :at])
    assert not out[:, at:].isfinite().all()

    q, k, v = (t.clone() for t in clean)
    bad_dout = dout.clone()
    q[:, at], bad_dout[:, at] = poison, poison
    out, _, _, dk, dv = run(q, k, v, bad_dout)
    rest = torch.arange(case.s_q) != at
    assert torch.equal(out[:, rest], expected[0][:, rest])
    assert torch.equal(dk[:, at + offset + 1 :], expected[3][:, at + offset + 1 :])
    assert torch.equal(dv[:, at + offset + 1 :], expected[4][:, at + offset + 1 :])


def test_scores_beyond_the_range_of_exp() -> None:
    q, k, v = draw(Case(1, 40, 300, 1, 1, 16, 16), torch.float32)
    out, lse = dsm.ops.flash_attn(q * 100, k * 100, v)
    expected, expected_lse = attention(*(t.transpose(1, 2) for t in (q * 100, k * 100, v)), 0.25, False)
    # Scores of 1e5 carry an absolute rounding error of 1e-2, which is a relative one of the probabilities.
    assert float((out.transpose(1, 2) - expected).abs().max()) < 0.1
    assert_close("lse", lse, expected_lse)


def test_all_scores_minus_infinity() -> None:
    q, k, v = torch.ones(1, 2, 1, 4), torch.full((1, 3, 1, 4), -float("inf")), torch.randn(1, 3, 1, 4)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    out, lse = dsm.ops.flash_attn(*inputs)
    assert torch.equal(out, torch.zeros_like(out))
    assert (lse == -torch.inf).all()
    _, _, dv = torch.autograd.grad(out.sum(), inputs)
    assert torch.equal(dv, torch.zeros_like(dv))


@pytest.mark.parametrize(
    "case",
    [Case(2, 300, 300, 6, 2, 32, 24), Case(1, 300, 300, 1, 1, 16, 16), Case(1, 1, 20000, 4, 2, 16, 16)],
    ids=["heads", "one-head", "decode"],
)
def test_same_bits_for_any_number_of_threads_and_on_reruns(case: Case) -> None:
    q, k, v = (t.requires_grad_() for t in draw(case, torch.float32))

    def run(threads: int) -> tuple[Tensor, ...]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            out, lse = dsm.ops.flash_attn(q, k, v, causal=True)
            return out, lse, *torch.autograd.grad((out.square().sum() + lse.sum()), (q, k, v))
        finally:
            torch.set_num_threads(before)

    first = run(1)
    for threads in (1, 2, 2, 3):
        for a, b in zip(first, run(threads), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ((2, 4, 3, 8), (2, 4, 2, 8), (2, 4, 2, 8), "h_q must be a multiple of h_kv = 2, got 3"),
        ((2, 4, 2, 8), (2, 4, 2, 9), (2, 4, 2, 8), r"k must be \[batch, s_kv, h_kv, d_qk\]"),
        ((2, 4, 2, 8), (2, 4, 2, 8), (2, 5, 2, 8), r"v must be \[batch, s_kv, h_kv, d_v\]"),
        ((2, 4, 2, 8), (3, 4, 2, 8), (3, 4, 2, 8), "k must be"),
        ((4, 2, 8), (4, 2, 8), (4, 2, 8), "q must be"),
        ((2, 4, 2, 8), (2, 4, 0, 8), (2, 4, 0, 8), "h_q must be"),
    ],
)
def test_bad_shapes_are_refused(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dsm.ops.flash_attn(torch.zeros(q), torch.zeros(k), torch.zeros(v))


def test_bad_dtypes_and_values_are_refused() -> None:
    x = torch.zeros(1, 2, 1, 4)
    with pytest.raises(ValueError, match=r"k must be .* float32, got .* float16"):
        dsm.ops.flash_attn(x, x.half(), x)
    with pytest.raises(ValueError, match=r"q must be .* got .* int32"):
        dsm.ops.flash_attn(x.int(), x.int(), x.int())
    with pytest.raises(ValueError, match="softmax_scale must be finite"):
        dsm.ops.flash_attn(x, x, x, softmax_scale=float("nan"))
    with pytest.raises(ValueError, match="must end in"):
        dsm.ops.flash_attn(x[0, 0, 0], x, x)


def test_second_derivative_is_refused() -> None:
    x = torch.randn(1, 3, 1, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(dsm.ops.flash_attn(x, x, x)[0].sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("varlen", [False, True], ids=["fixed", "varlen"])
def test_opcheck(varlen: bool) -> None:
    q, k, v = (t.requires_grad_() for t in draw(Case(1, 6, 6, 4, 2, 8, 5), torch.float32))
    cu_seqlens = None
    if varlen:
        q, k, v = (t.detach()[0].requires_grad_() for t in (q, k, v))
        cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32)
    torch.library.opcheck(torch.ops.dsm.flash_attn.default, (q, k, v, cu_seqlens, cu_seqlens, 0.3, True))


def test_compile_fullgraph() -> None:
    q, k, v = (t.requires_grad_() for t in draw(Case(1, 6, 6, 4, 2, 8, 5), torch.float32))

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = dsm.ops.flash_attn(q, k, v, causal=True)
        return out.sum() + lse.sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), f(q, k, v))
    for a, b in zip(
        torch.autograd.grad(compiled(q, k, v), (q, k, v)), torch.autograd.grad(f(q, k, v), (q, k, v)), strict=True
    ):
        assert torch.equal(a, b)
