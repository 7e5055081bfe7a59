# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ds_flashdmla_moe as dsm
from threads import assert_same_bits
from tolerance import FLOATING, assert_close


def routing(tokens: int, topk: int, rows: int) -> Tensor:
    """Slots that name different rows, and about a third that name none; rows >= tokens * topk leaves some unused."""
    row_of_slot = torch.randperm(rows)[: tokens * topk].view(tokens, topk).to(torch.int32)
    row_of_slot[torch.rand(tokens, topk) < 0.3] = -1
    return row_of_slot


def truth(rows: Tensor, row_of_slot: Tensor, weights: Tensor | None, shared: Tensor | None) -> Tensor:
    y = [rows[:0].sum(0) for _ in row_of_slot]
    for t, slots in enumerate(row_of_slot.tolist()):
        for k, row in enumerate(slots):
            if row >= 0:
                y[t] = y[t] + rows[row] * (1 if weights is None else weights[t, k])
        if shared is not None:
            y[t] = y[t] + shared[t]
    return torch.stack(y)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("with_shared", [False, True])
@pytest.mark.parametrize(("tokens", "topk", "hidden"), [(1, 1, 1), (9, 3, 33), (40, 8, 130)])
def test_forward_and_backward_match_float64(
    tokens: int, topk: int, hidden: int, with_shared: bool, weighted: bool, dtype: torch.dtype
) -> None:
    row_of_slot = routing(tokens, topk, tokens * topk + 3)
    named = row_of_slot[row_of_slot >= 0].long()
    rows = torch.full((tokens * topk + 3, hidden), float("nan"))  # rows that no slot names are never read
    rows[named] = torch.randn(len(named), hidden)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = [rows.to(dtype).requires_grad_()]
    weights = torch.rand(tokens, topk, dtype=wide).requires_grad_() if weighted else None
    shared = torch.randn(tokens, hidden).to(dtype).requires_grad_() if with_shared else None
    inputs += [t for t in (weights, shared) if t is not None]
    dy = torch.randn(tokens, hidden).to(dtype)

    y = dsm.ops.moe_combine(inputs[0], row_of_slot, weights, shared)
    gradients = torch.autograd.grad(y, inputs, dy)

    wide_inputs = [t.detach().double().requires_grad_() for t in inputs]
    rest = iter(wide_inputs[1:])
    expected = truth(wide_inputs[0], row_of_slot, next(rest) if weighted else None, next(rest) if with_shared else None)
    expected_gradients = torch.autograd.grad(expected, wide_inputs, dy.double(), materialize_grads=True)
    assert_close("y", y, expected)
    for name, gradient, expected_gradient in zip(
        ["drows", "dweights or dshared", "dshared"], gradients, expected_gradients, strict=False
    ):
        assert_close(name, gradient, expected_gradient)


def test_gradcheck() -> None:
    rows = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    shared = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    row_of_slot = torch.tensor([[5, 0], [-1, 2], [6, 4]], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda r, w, s: dsm.ops.moe_combine(r, row_of_slot, w, s), (rows, weights, shared))
    assert torch.autograd.gradcheck(lambda r: dsm.ops.moe_combine(r, row_of_slot), (rows,))


def test_the_order_of_the_sum_is_that_of_the_rows() -> None:
    """1e8 + 1 - 1e8 is 0 or 1 in float32, depending on the order: slots in any order must give the same."""
    rows = torch.tensor([[1e8], [-1e8], [1.0]])
    for slots in ([0, 1, 2], [2, 0, 1], [0, 2, 1]):
        row_of_slot = torch.tensor([slots], dtype=torch.int32)
        assert dsm.ops.moe_combine(rows, row_of_slot).item() == 1.0
    assert dsm.ops.moe_combine(rows[:2].flip(0), row_of_slot[:, :1] * 0, shared=rows[:1]).item() == 0.0


def test_no_slot_no_result() -> None:
    nothing = torch.full((3, 2), -1, dtype=torch.int32)
    rows = torch.full((4, 5), float("nan"), requires_grad=True)
    y = dsm.ops.moe_combine(rows, nothing)
    assert (y == 0).all()
    assert (torch.autograd.grad(y.sum(), rows)[0] == 0).all()
    assert dsm.ops.moe_combine(rows, nothing[:0]).shape == (0, 5)


def test_bad_arguments_are_refused() -> None:
    rows, slots = torch.zeros(4, 5), torch.zeros(3, 2, dtype=torch.int32)
    for bad in (4, 2**31 - 1):
        with pytest.raises(ValueError, match=f"row_of_slot must be below the number of rows, 4, got {bad}"):
            dsm.ops.moe_combine(rows, slots + bad)
    with pytest.raises(ValueError, match=r"weights must be \[tokens, topk\] = \[3, 2\] float32"):
        dsm.ops.moe_combine(rows, slots, torch.zeros(3, 2).half())
    with pytest.raises(ValueError, match=r"weights must be .* float32, got .* float64"):
        dsm.ops.moe_combine(rows, slots, torch.zeros(3, 2).double())
    with pytest.raises(ValueError, match=r"shared must be \[tokens, hidden\] = \[3, 5\]"):
        dsm.ops.moe_combine(rows, slots, shared=torch.zeros(2, 5))
    with pytest.raises(ValueError, match="row_of_slot must be free of repetitions, got row 0 twice"):
        dsm.ops.moe_combine(rows.requires_grad_(), slots).sum().backward()


def test_same_bits_for_any_number_of_threads() -> None:
    row_of_slot = routing(900, 4, 3700)
    rows, weights = torch.randn(3700, 50, requires_grad=True), torch.randn(900, 4, requires_grad=True)

    def run() -> list[Tensor]:
        y = dsm.ops.moe_combine(rows, row_of_slot, weights)
        return [y, *torch.autograd.grad(y.square().sum(), (rows, weights))]

    assert_same_bits(run)


def test_opcheck_and_compile() -> None:
    rows, weights = torch.randn(7, 3, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    shared = torch.randn(3, 3, requires_grad=True)
    row_of_slot = torch.tensor([[5, 0], [-1, 2], [6, 4]], dtype=torch.int32)
    torch.library.opcheck(torch.ops.dsm.moe_combine.default, (rows, row_of_slot, weights, shared))
    torch.library.opcheck(torch.ops.dsm.moe_combine.default, (rows, row_of_slot, None, None))
    compiled = torch.compile(dsm.ops.moe_combine, fullgraph=True, backend="aot_eager")
    y = compiled(rows, row_of_slot, weights, shared)
    assert torch.equal(y, dsm.ops.moe_combine(rows, row_of_slot, weights, shared))
    y.sum().backward()
    assert rows.grad is not None
    assert torch.equal(shared.grad, torch.ones(3, 3))
