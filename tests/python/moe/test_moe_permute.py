# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ds_flashdmla_moe as dsm
from threads import assert_same_bits
from tolerance import FLOATING, assert_close


@st.composite
def routings(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Indices [tokens, topk] with dropped pairs, repeated experts and experts nobody visits."""
    experts, tokens, topk = draw(st.integers(1, 9)), draw(st.integers(0, 12)), draw(st.integers(1, 4))
    index = st.integers(0, experts - 1) | st.sampled_from([-1, -experts, -(2**31)])
    values = draw(st.lists(index, min_size=tokens * topk, max_size=tokens * topk))
    return torch.tensor(values, dtype=torch.int32).view(tokens, topk), experts


@settings(max_examples=150, deadline=None)
@given(routings())
def test_plan_invariants(routing: tuple[Tensor, int]) -> None:
    indices, experts = routing
    tokens, topk = indices.shape
    x = torch.randn(tokens, 3)
    rows, offsets, row_of_slot, slot_of_row = dsm.ops.moe_permute(x, indices, experts)

    pairs = indices.flatten().tolist()
    by_expert = sorted((e, slot) for slot, e in enumerate(pairs) if e >= 0)
    kept = [slot for _, slot in by_expert]
    assert slot_of_row.tolist() == kept + [-1] * (len(pairs) - len(kept))
    counts = [pairs.count(e) for e in range(experts)]
    assert offsets.tolist() == [sum(counts[:e]) for e in range(experts + 1)]
    inverse = {slot: row for row, slot in enumerate(kept)}
    assert row_of_slot.flatten().tolist() == [inverse.get(slot, -1) for slot in range(len(pairs))]
    assert torch.equal(rows[: len(kept)], x[[slot // topk for slot in kept]])
    assert (rows[len(kept) :] == 0).all()
    # Back again: every kept pair returns its own token.
    counts_of_token = (indices >= 0).sum(1, keepdim=True)
    assert torch.allclose(dsm.ops.moe_combine(rows, row_of_slot), x * counts_of_token)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_gradient_is_the_sum_over_a_tokens_rows(dtype: torch.dtype) -> None:
    indices = torch.tensor([[2, 0], [0, -1], [1, 2], [-3, -1]], dtype=torch.int32)
    x = torch.randn(4, 70).to(dtype).requires_grad_()
    rows, _, row_of_slot, _ = dsm.ops.moe_permute(x, indices, 3)
    drows = torch.randn(8, 70).to(dtype)
    (dx,) = torch.autograd.grad(rows, x, drows)
    truth = torch.zeros(4, 70, dtype=torch.float64)
    for t, slots in enumerate(row_of_slot.tolist()):
        for row in slots:
            if row >= 0:
                truth[t] += drows[row].double()
    assert_close("dx", dx, truth)


def test_gradcheck() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[2, 0], [0, -1], [1, 1], [-3, -1]], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda v: dsm.ops.moe_permute(v, indices, 4)[0], (x,))


def test_strided_rows_and_empty_problems() -> None:
    part = torch.randn(5, 40)[:, 3:19]
    indices = torch.randint(4, (5, 2), dtype=torch.int32)
    assert torch.equal(dsm.ops.moe_permute(part, indices, 4)[0], dsm.ops.moe_permute(part.contiguous(), indices, 4)[0])
    rows, offsets, row_of_slot, slot_of_row = dsm.ops.moe_permute(part[:0], indices[:0], 4)
    assert (rows.shape, row_of_slot.shape, slot_of_row.shape) == ((0, 16), (0, 2), (0,))
    assert offsets.tolist() == [0] * 5
    assert dsm.ops.moe_permute(part[:, :0], indices, 4)[0].shape == (10, 0)


@pytest.mark.parametrize("bad", [4, 2**31 - 1])
def test_experts_that_do_not_exist_are_refused(bad: int) -> None:
    with pytest.raises(ValueError, match=f"indices must be below the number of experts, 4, got {bad}"):
        dsm.ops.moe_permute(torch.zeros(1, 2), torch.tensor([[0, bad]], dtype=torch.int32), 4)


def test_bad_arguments_are_refused() -> None:
    x, indices = torch.zeros(3, 4), torch.zeros(3, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"indices must be .* int32, got .* int64"):
        dsm.ops.moe_permute(x, indices.long(), 4)
    with pytest.raises(ValueError, match=r"x must be \[tokens, hidden\] = \[3, any\]"):
        dsm.ops.moe_permute(x[:2], indices, 4)
    with pytest.raises(ValueError, match=r"x must be .* got .* int32"):
        dsm.ops.moe_permute(x.int(), indices, 4)
    with pytest.raises(ValueError, match="experts must be at least 0"):
        dsm.ops.moe_permute(x, indices, -1)


def test_same_bits_for_any_number_of_threads() -> None:
    x = torch.randn(2000, 48, requires_grad=True)
    indices = torch.randint(-1, 16, (2000, 3), dtype=torch.int32)

    def run() -> list[Tensor]:
        rows, *plan = dsm.ops.moe_permute(x, indices, 16)
        return [rows, *plan, *torch.autograd.grad(rows.square().sum(), x)]

    assert_same_bits(run)


def test_opcheck_and_compile() -> None:
    x = torch.randn(5, 8, requires_grad=True)
    indices = torch.randint(-1, 4, (5, 2), dtype=torch.int32)
    torch.library.opcheck(torch.ops.dsm.moe_permute.default, (x, indices, 4))
    torch.library.opcheck(torch.ops.dsm.moe_permute.default, (x[:0], indices[:0], 4))
    compiled = torch.compile(dsm.ops.moe_permute, fullgraph=True, backend="aot_eager")
    rows, *_ = compiled(x, indices, 4)
    assert torch.equal(rows, dsm.ops.moe_permute(x, indices, 4)[0])
    rows.sum().backward()
    assert torch.equal(x.grad, (indices >= 0).sum(1, keepdim=True).expand(5, 8).float())
