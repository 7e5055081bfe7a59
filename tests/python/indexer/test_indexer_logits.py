# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import ds_flashdmla_moe as dsm
from threads import assert_same_bits
from tolerance import FLOATING, ULP, assert_close

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
HIDDEN = -math.inf


def truth(
    q: Tensor, k: Tensor, weights: Tensor, k_scale: Tensor | None = None, ranges: list[tuple[int, int]] | None = None
) -> Tensor:
    """Query by query, from the formula."""
    scale = torch.ones(k.shape[0], dtype=torch.float64) if k_scale is None else k_scale.double()
    rows = []
    for i in range(q.shape[0]):
        begin, end = (0, k.shape[0]) if ranges is None else ranges[i]
        begin, end = min(max(begin, 0), k.shape[0]), min(max(end, 0), k.shape[0])
        seen = slice(begin, max(begin, end))
        row = scale[seen] * (weights[i].double()[:, None] * (q[i].double() @ k[seen].double().T).relu()).sum(0)
        before, behind = torch.full((seen.start,), HIDDEN), torch.full((k.shape[0] - seen.stop,), HIDDEN)
        rows.append(torch.cat((before, row, behind)))
    return torch.stack(rows) if rows else torch.zeros(0, k.shape[0])


def operands(s_q: int, s_kv: int, heads: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    return torch.randn(s_q, heads, d).to(dtype), torch.randn(s_kv, d).to(dtype), torch.randn(s_q, heads, dtype=wide)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (5, 37, 3, 16), (9, 300, 64, 128), (1, 4200, 2, 8), (600, 5, 1, 4)], ids=str
)
@pytest.mark.parametrize("ranged", [False, True])
def test_forward_and_backward_match_float64(sizes: tuple[int, ...], ranged: bool, dtype: torch.dtype) -> None:
    s_q, s_kv, heads, d = sizes
    q, k, weights = (t.requires_grad_() for t in operands(*sizes, dtype))
    ranges = [(i % 4 - 1, s_kv - 7 * i % (s_kv + 1)) for i in range(s_q)] if ranged else None
    limits = {}
    if ranges:
        limits = {
            "starts": torch.tensor([r[0] for r in ranges], dtype=torch.int32),
            "ends": torch.tensor([r[1] for r in ranges], dtype=torch.int32),
        }
    logits = dsm.ops.indexer_logits(q, k, weights, **limits)
    dlogits = torch.randn_like(logits)
    logits.backward(dlogits)

    wide = [t.detach().double().requires_grad_() for t in (q, k, weights)]
    expected = truth(*wide, ranges=ranges)
    (expected[expected != HIDDEN] * dlogits.double()[expected != HIDDEN]).sum().backward()
    assert logits.dtype == weights.dtype
    assert torch.equal(logits == HIDDEN, expected == HIDDEN)
    # Sums over heads and dimensions of terms with either sign.
    terms = float(weights.detach().abs().max()) * heads * d
    assert_close("logits", logits, expected, scale=terms)
    for name, value, reference in zip(("dq", "dk", "dweights"), (q, k, weights), wide, strict=True):
        grad = reference.grad if reference.grad is not None else torch.zeros_like(reference)
        assert_close(name, value.grad, grad, scale=max(1.0, float(grad.abs().max())))


def test_golden_values() -> None:
    q = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    k = torch.tensor([[3.0, 1.0], [-1.0, 4.0], [0.5, -2.0]])
    weights = torch.tensor([[10.0, -1.0]])
    assert dsm.ops.indexer_logits(q, k, weights).tolist() == [[28.0, -8.0, 5.0]]


def test_fp8_operands_are_exact_values() -> None:
    q, k, weights = operands(6, 150, 4, 32, torch.float32)
    q8, q_scale = dsm.ops.hadamard_quantize(q, "fp8")
    k8, k_scale = dsm.ops.hadamard_quantize(k, "fp8")
    logits = dsm.ops.indexer_logits(q8, k8, weights * q_scale, k_scale)
    decoded = (q8.double() * q_scale.double()[..., None], k8.double() * k_scale.double()[:, None])
    assert_close("fp8", logits, truth(*decoded, weights), scale=float(weights.abs().max()) * 4 * 32)
    # One power of two per vector keeps the scores: the rotation cancels up to 3 bits of mantissa.
    plain = truth(q, k, weights)
    assert float((logits - plain).abs().max()) < 0.1 * float(plain.abs().max())
    mixed = dsm.ops.indexer_logits(q8.float(), k8, weights * q_scale, k_scale)
    assert torch.equal(mixed, logits)


def test_relu_comes_before_the_key_scale() -> None:
    logits = dsm.ops.indexer_logits(
        torch.ones(1, 1, 1).to(torch.float8_e4m3fn),
        torch.tensor([[2.0], [-2.0]]).to(torch.float8_e4m3fn),
        torch.ones(1, 1),
        torch.tensor([-1.0, -1.0]),
    )
    assert logits.tolist() == [[-2.0, 0.0]]


@pytest.mark.parametrize("fp8", [False, True])
def test_hostile_ranges_and_keys(fp8: bool) -> None:
    q, k, weights = operands(7, 20, 3, 16, torch.float32)
    if fp8:
        q, k = q.to(torch.float8_e4m3fn), k.to(torch.float8_e4m3fn)
    ranges = [(-1, 5), (INT_MIN, INT_MAX), (INT_MAX, INT_MIN), (20, 21), (4, 4), (9, 3), (0, 1)]
    starts, ends = torch.tensor(ranges, dtype=torch.int32).T
    # Query 1 sees all keys; without it, keys from 5 on are seen by none.
    some = [0, 2, 3, 4, 5, 6]
    clean = dsm.ops.indexer_logits(q, k, weights, starts=starts, ends=ends)
    assert_close("ranges", clean, truth(q, k, weights, ranges=ranges), scale=100.0)
    poisoned = k.clone()
    poisoned.view(torch.uint8)[5:] = 0xFF  # NaN in every format
    again = dsm.ops.indexer_logits(q, poisoned, weights, starts=starts, ends=ends)
    assert torch.equal(again[some], clean[some])
    assert again[1, 5:].isnan().all()
    assert torch.equal(again[1, :5], clean[1, :5])


def test_backward_never_touches_keys_out_of_range() -> None:
    q, k, weights = (t.requires_grad_() for t in operands(4, 200, 3, 16, torch.float32))
    ends = torch.tensor([3, 0, INT_MIN, 140], dtype=torch.int32)
    with torch.no_grad():
        k[140:] = float("nan")
    logits = dsm.ops.indexer_logits(q, k, weights, ends=ends)
    dlogits = torch.randn_like(logits).masked_fill(logits == HIDDEN, float("nan"))
    grads = torch.autograd.grad(logits, (q, k, weights), dlogits)
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[1][140:].count_nonzero() == 0
    assert grads[0][1:3].count_nonzero() == 0
    assert grads[2][1:3].count_nonzero() == 0


def test_empty_problems() -> None:
    for s_q, s_kv, heads, d in [(0, 3, 2, 4), (3, 0, 2, 4), (3, 2, 0, 4), (3, 2, 2, 0)]:
        q, k, weights = (t.requires_grad_() for t in operands(s_q, s_kv, heads, d, torch.float32))
        logits = dsm.ops.indexer_logits(q, k, weights)
        assert logits.shape == (s_q, s_kv)
        assert logits.count_nonzero() == 0
        for grad in torch.autograd.grad(logits.sum(), (q, k, weights)):
            assert grad.count_nonzero() == 0


def test_gradcheck() -> None:
    q, k, weights = (t.requires_grad_() for t in operands(4, 7, 3, 5, torch.float64))
    ends = torch.tensor([7, 2, 0, 5], dtype=torch.int32)
    seen = torch.arange(7) < ends[:, None]
    assert torch.autograd.gradcheck(
        lambda *inputs: dsm.ops.indexer_logits(*inputs, ends=ends).masked_select(seen), (q, k, weights)
    )


def test_strided_views_and_same_bits() -> None:
    q, k, weights = torch.randn(40, 6, 48), torch.randn(300, 64), torch.randn(40, 12)
    views = q[::2, 1::2, 8:40], k[:, 16:48], weights[::2, :3]
    assert torch.equal(dsm.ops.indexer_logits(*views), dsm.ops.indexer_logits(*(v.contiguous() for v in views)))
    leaves = [v.contiguous().requires_grad_() for v in views]
    assert_same_bits(
        lambda: [logits := dsm.ops.indexer_logits(*leaves), *torch.autograd.grad(logits.square().sum(), leaves)]
    )


def test_rows_do_not_depend_on_the_batch() -> None:
    q, k, weights = operands(30, 5000, 5, 16, torch.bfloat16)
    whole = dsm.ops.indexer_logits(q, k, weights)
    assert torch.equal(dsm.ops.indexer_logits(q[17:18], k, weights[17:18]), whole[17:18])
    assert torch.equal(dsm.ops.indexer_logits(q, k[4090:4110], weights), whole[:, 4090:4110])


Q, K, W = torch.zeros(3, 2, 8), torch.zeros(5, 8), torch.zeros(3, 2)
FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": Q[0]}, "q must be of 3 dimensions"),
        ({"q": Q.int()}, r"q must be \[s_q, heads, d\] .* got .* int32"),
        ({"k": K.double()}, r"k must be \[s_kv, d\] = \[any, 8\] float32\|float8_e4m3fn, got \[5, 8\] float64"),
        ({"k": K[:, 1:]}, r"k must be \[s_kv, d\] = \[any, 8\]"),
        ({"q": Q.to(FP8)}, "k must be .* float8_e4m3fn, got .* float32"),
        ({"q": Q.double(), "k": K.to(FP8), "weights": W.double()}, "k must be .* float64, got .* float8_e4m3fn"),
        ({"weights": W.double()}, r"weights must be \[s_q, heads\] = \[3, 2\] float32"),
        ({"weights": W[:2]}, "weights must be"),
        ({"k_scale": torch.zeros(5)}, "k_scale must be given with FP8 keys only"),
        ({"k": K.to(FP8), "k_scale": torch.zeros(4)}, r"k_scale must be \[s_kv\] = \[5\]"),
        ({"ends": torch.zeros(3)}, r"ends must be \[s_q\] = \[3\] int32"),
        ({"starts": torch.zeros(2, dtype=torch.int32)}, r"starts must be \[s_q\] = \[3\]"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dsm.ops.indexer_logits(**({"q": Q, "k": K, "weights": W} | arguments))


def test_gradients_of_fp8_and_second_derivatives_are_refused() -> None:
    weights = W.clone().requires_grad_()
    logits = dsm.ops.indexer_logits(Q.to(FP8), K.to(FP8), weights)
    with pytest.raises(NotImplementedError, match="no gradient for FP8 operands"):
        logits.sum().backward()
    q = Q.clone().requires_grad_()
    (grad,) = torch.autograd.grad(dsm.ops.indexer_logits(q, K, W).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_opcheck_and_compile() -> None:
    q, k, weights = (t.requires_grad_() for t in operands(3, 5, 2, 8, torch.float32))
    ends = torch.tensor([5, 2, 0], dtype=torch.int32)
    torch.library.opcheck(torch.ops.dsm.indexer_logits.default, (q, k, weights, None, None, None))
    fp8 = (q.detach().to(FP8), k.detach().to(FP8), weights.detach(), torch.ones(5), None, ends)
    # torch itself cannot compare FP8 tensors, as the check of the schema does.
    torch.library.opcheck(torch.ops.dsm.indexer_logits.default, fp8, test_utils="test_faketensor")
    compiled = torch.compile(dsm.ops.indexer_logits, fullgraph=True, backend="aot_eager")
    logits = compiled(q, k, weights, ends=ends)
    assert torch.equal(logits, dsm.ops.indexer_logits(q, k, weights, ends=ends))
    logits[0].sum().backward()
    assert float(q.grad.abs().max()) > ULP[torch.float32]
