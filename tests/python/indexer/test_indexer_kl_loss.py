# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import ds_flashdmla_moe as dsm
from threads import assert_same_bits
from tolerance import assert_close

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
WIDE = (torch.float64, torch.float32)


def truth(logits: Tensor, target: Tensor, indices: list[list[int]]) -> Tensor:
    """Row by row over the slots that have a key; float64, differentiable."""
    rows = []
    for x, t, row in zip(logits, target, indices, strict=True):
        values = x.tolist()
        slots = [s for s, j in enumerate(row) if 0 <= j < x.numel() and values[j] > -math.inf]
        picked, p = x[[row[s] for s in slots]], t[slots]
        if not p.count_nonzero():
            rows.append(x.new_zeros(()))
            continue
        p = p / p.sum()
        rows.append((torch.xlogy(p, p) - p * (picked - picked.logsumexp(0))).sum())
    return torch.stack(rows) if rows else logits.new_zeros(0)


def check(logits: Tensor, target: Tensor, indices: Tensor | None) -> None:
    logits = logits.detach().requires_grad_()
    loss = dsm.ops.indexer_kl_loss(logits, target, indices)
    dloss = torch.rand_like(loss)
    (dlogits,) = torch.autograd.grad(loss, logits, dloss)
    wide = logits.detach().double().requires_grad_()
    every = [list(range(logits.shape[1]))] * logits.shape[0]
    expected = truth(wide, target.double(), every if indices is None else indices.tolist())
    expected_grad = torch.zeros_like(wide)
    if expected.requires_grad:
        (expected_grad,) = torch.autograd.grad(expected, wide, dloss.double())
    assert loss.dtype == logits.dtype
    assert_close("loss", loss, expected, scale=1.0)
    assert_close("dlogits", dlogits, expected_grad)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize(("rows", "n", "slots"), [(1, 1, 1), (5, 30, 8), (3, 700, 513), (0, 4, 2), (3, 4, 0)])
def test_selected_keys(rows: int, n: int, slots: int, dtype: torch.dtype) -> None:
    logits = torch.randn(rows, n, dtype=dtype).mul(4)
    indices = (
        torch.stack([torch.randperm(n)[:slots] for _ in range(rows)]).int() if rows else torch.zeros(0, slots).int()
    )
    indices = indices.masked_fill(torch.rand(rows, slots) < 0.2, -1)
    check(logits, torch.rand(rows, slots, dtype=dtype), indices)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_all_visible_keys(dtype: torch.dtype) -> None:
    logits = torch.randn(6, 40, dtype=dtype).masked_fill(torch.arange(40) >= torch.arange(6)[:, None] * 9, -math.inf)
    check(logits, torch.rand(6, 40, dtype=dtype), None)


def test_golden_values() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64)
    target = torch.tensor([[2.0, 2.0]], dtype=torch.float64)
    # softmax = (1/4, 3/4), p = (1/2, 1/2): log 2 · 1/2 + log(2/3) · 1/2
    assert dsm.ops.indexer_kl_loss(logits, target).item() == pytest.approx(0.5 * math.log(4 / 3))
    # The targets of a perfect indexer, whatever their sum.
    assert dsm.ops.indexer_kl_loss(logits, torch.tensor([[5.0, 15.0]]).double()).item() == pytest.approx(0, abs=1e-15)
    # All on one key: −log softmax; the key with no target counts in the softmax.
    assert dsm.ops.indexer_kl_loss(logits, torch.tensor([[7.0, 0.0]]).double()).item() == pytest.approx(math.log(4))


def test_rows_without_keys_or_targets_contribute_nothing() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    target = torch.tensor([[1.0, 2.0], [math.nan, math.nan], [0.0, 0.0], [1.0, math.nan]])
    indices = torch.tensor([[0, 1], [-1, -1], [0, 2], [1, -1]], dtype=torch.int32)
    loss = dsm.ops.indexer_kl_loss(logits, target, indices)
    loss.sum().backward()
    assert loss[1:].tolist() == [0, 0, 0]
    assert logits.grad[1:].count_nonzero() == 0
    hidden = torch.full((2, 3), -math.inf, requires_grad=True)
    loss = dsm.ops.indexer_kl_loss(hidden, torch.ones(2, 3))
    loss.sum().backward()
    assert loss.tolist() == [0, 0]
    assert hidden.grad.count_nonzero() == 0


@pytest.mark.parametrize("bad", [-1, INT_MIN, INT_MAX, 5])
def test_hostile_indices(bad: int) -> None:
    logits, target = torch.randn(2, 5), torch.rand(2, 4)
    indices = torch.tensor([[0, 3, 1, bad], [bad, 4, bad, 2]], dtype=torch.int32)
    check(logits, target, indices)
    clean = dsm.ops.indexer_kl_loss(logits, target, indices)
    target[0, 3] = target[1, 0] = target[1, 2] = math.nan
    logits[0, [2, 4]] = math.nan
    assert torch.equal(dsm.ops.indexer_kl_loss(logits, target, indices), clean)


def test_duplicates_add_up_and_nan_of_a_key_shows() -> None:
    indices = torch.tensor([[1, 1, 0]], dtype=torch.int32)
    check(torch.randn(1, 3), torch.rand(1, 3), indices)
    loss = dsm.ops.indexer_kl_loss(torch.tensor([[0.0, math.nan, 1.0]]), torch.ones(1, 3), indices)
    assert loss.isnan().all()


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0]], requires_grad=True)
    loss = dsm.ops.indexer_kl_loss(logits, torch.tensor([[1.0, 0.0, 0.0]]))
    loss.sum().backward()
    assert loss.item() == 0
    assert logits.grad.isfinite().all()


def test_gradcheck() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    target = torch.rand(4, 3, dtype=torch.float64)
    indices = torch.tensor([[5, 0, 2], [1, -1, 3], [-1, -1, -1], [4, 4, 0]], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x: dsm.ops.indexer_kl_loss(x, target, indices), (logits,))
    assert torch.autograd.gradcheck(lambda x: dsm.ops.indexer_kl_loss(x, target.repeat(1, 2)), (logits,))


def test_training_teaches_the_indexer_what_the_attention_sees() -> None:
    """Logits, selection and loss together, as in the sparse stage of training."""
    s_q, s_kv, heads, d, topk = 12, 40, 3, 16, 8
    k = torch.randn(s_kv, d)
    wanted = torch.rand(s_q, s_kv)
    ends = torch.arange(s_q, dtype=torch.int32) * 3
    q = torch.randn(s_q, heads, d, requires_grad=True)
    weights = torch.randn(s_q, heads, requires_grad=True)
    optimizer = torch.optim.Adam((q, weights), lr=0.02)
    losses = []
    for _ in range(40):
        logits = dsm.ops.indexer_logits(q, k, weights, ends=ends)
        indices = dsm.ops.indexer_topk(logits, topk)
        target = wanted.gather(1, indices.clamp_min(0).long())
        loss = dsm.ops.indexer_kl_loss(logits, target, indices).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert q.grad[0].count_nonzero() == 0  # the first query sees no key


def test_strided_views_and_same_bits() -> None:
    logits, target = torch.randn(60, 300)[:, 20:220], torch.rand(60, 64)[:, ::2]
    indices = torch.randint(-5, 200, (60, 70), dtype=torch.int32)[:, 3:35]
    loss = dsm.ops.indexer_kl_loss(logits, target, indices)
    assert torch.equal(loss, dsm.ops.indexer_kl_loss(*(t.contiguous() for t in (logits, target, indices))))
    leaf = logits.contiguous().requires_grad_()
    assert_same_bits(
        lambda: [
            loss := dsm.ops.indexer_kl_loss(leaf, target, indices),
            *torch.autograd.grad(loss.sum(), leaf),
        ]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.zeros(4)}, "logits must be of 2 dimensions"),
        ({"logits": torch.zeros(2, 4).half()}, r"logits must be \[rows, n\] .* float64\|float32, got .* float16"),
        ({"target": torch.zeros(2, 3)}, r"target must be \[rows, n\] = \[2, 4\] float32"),
        ({"target": torch.zeros(2, 4).double()}, "target must be .* float32, got .* float64"),
        ({"indices": torch.zeros(2, 3, dtype=torch.int32)}, r"target must be \[rows, slots\] = \[2, 3\]"),
        ({"indices": torch.zeros(2, 4)}, r"indices must be \[rows, slots\] = \[2, any\] int32"),
        ({"indices": torch.zeros(3, 4, dtype=torch.int32)}, "indices must be"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dsm.ops.indexer_kl_loss(**({"logits": torch.zeros(2, 4), "target": torch.zeros(2, 4)} | arguments))


def test_second_derivative_is_refused() -> None:
    logits = torch.randn(2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(dsm.ops.indexer_kl_loss(logits, torch.rand(2, 4)).sum(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_opcheck_and_compile() -> None:
    logits, target = torch.randn(3, 6, requires_grad=True), torch.rand(3, 2)
    indices = torch.tensor([[0, 5], [2, -1], [-1, -1]], dtype=torch.int32)
    torch.library.opcheck(torch.ops.dsm.indexer_kl_loss.default, (logits, target, indices))
    torch.library.opcheck(torch.ops.dsm.indexer_kl_loss.default, (logits, torch.rand(3, 6), None))
    compiled = torch.compile(dsm.ops.indexer_kl_loss, fullgraph=True, backend="aot_eager")
    loss = compiled(logits, target, indices)
    assert torch.equal(loss, dsm.ops.indexer_kl_loss(logits, target, indices))
    loss.sum().backward()
    assert logits.grad is not None
