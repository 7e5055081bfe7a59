# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import itertools
from typing import Any

import moe_truth
import pytest
import torch
from torch import Tensor

import ds_flashdmla_moe as dsm
from threads import assert_same_bits
from tolerance import assert_close

SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
NORMALIZE = (
    {"renormalize": False},
    {"renormalize": True},
    {"renormalize": False, "renormalize_after_drop": True},
)
SELECTIONS = ("plain", "bias", "groups", "hash")


def options_of(selection: str, tokens: int, experts: int, topk: int) -> dict[str, Any]:
    if selection == "bias":
        return {"bias": torch.randn(experts)}
    if selection == "groups":
        return {"bias": torch.randn(experts), "n_group": 4, "topk_group": 2}
    if selection == "hash":
        table = torch.stack([torch.randperm(experts)[:topk] for _ in range(11)])
        return {"token_ids": torch.randint(11, (tokens,)), "tid2eid": table.to(torch.int32)}
    return {}


CASES = list(itertools.product(SCORINGS, range(3), SELECTIONS, (None, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("scoring", "normalize", "selection", "capacity_rows"), CASES)
def test_forward_and_backward_match_float64(
    scoring: str, normalize: int, selection: str, capacity_rows: int | None, dtype: torch.dtype
) -> None:
    tokens, experts, topk = 23, 8, 3
    options = {"scoring": scoring, "capacity_rows": capacity_rows, "routed_scaling_factor": 2.5}
    options |= NORMALIZE[normalize] | options_of(selection, tokens, experts, topk)
    logits = torch.randn(tokens, experts).mul(2).to(dtype).requires_grad_()
    dweights = torch.randn(tokens, topk, dtype=dtype)

    weights, indices = dsm.ops.moe_gate(logits, topk, **options)
    weights.backward(dweights)

    truth_logits = moe_truth.wide(logits)
    truth, truth_indices = moe_truth.gate(truth_logits, topk, **options)
    truth.backward(dweights.double())
    assert indices.tolist() == truth_indices
    assert capacity_rows is None or bool((indices < 0).any()), "the case is meant to drop"
    assert_close("weights", weights, truth)
    assert_close("dlogits", logits.grad, truth_logits.grad)


def test_golden_values_of_sqrtsoftplus() -> None:
    """sqrt(softplus) of DeepSeek-V4's gate, evaluated in float64; softplus(v) is v itself beyond 20."""
    logits = torch.tensor([[-3.0, -1.0, 0.0, 0.5, 2.0, 25.0, 20.5, 36.0]])
    golden = [0.2204254, 0.5596979, 0.8325546, 0.9869534, 1.4583991, 5.0, 20.5**0.5, 6.0]
    weights, indices = dsm.ops.moe_gate(logits, 8, scoring="sqrtsoftplus", renormalize=False)
    scores = torch.zeros(8).scatter(0, indices[0].long(), weights[0])
    assert torch.allclose(scores, torch.tensor(golden), rtol=1e-6, atol=0)
    assert scores[[5, 7]].tolist() == [5.0, 6.0]


def test_gate_of_deepseek_v3_by_hand() -> None:
    """Eight experts in four groups: the bias chooses, the scores without it weigh."""
    logits = torch.tensor([[0.0, 0.0, 2.0, -2.0, 1.0, 1.0, -1.0, -1.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    # Groups are worth 1, 1, 1.462 and 1.538; in the last two, 1.269 > 0.731 = 0.731 > 0.269.
    weights, indices = dsm.ops.moe_gate(
        logits, 3, bias=bias, scoring="sigmoid", n_group=4, topk_group=2, routed_scaling_factor=2.5
    )
    assert indices.tolist() == [[6, 4, 5]]
    scores = torch.sigmoid(torch.tensor([-1.0, 1.0, 1.0]))
    assert torch.allclose(weights[0], scores / scores.sum() * 2.5, rtol=1e-6)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_gradcheck(scoring: str) -> None:
    logits = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    for normalize, selection, capacity_rows in itertools.product(NORMALIZE, SELECTIONS, (None, 2)):
        options = normalize | options_of(selection, 6, 8, 3) | {"capacity_rows": capacity_rows}
        assert torch.autograd.gradcheck(
            lambda v, options=options: dsm.ops.moe_gate(v, 3, scoring=scoring, **options)[0], (logits,)
        )


def test_ties_go_to_the_smaller_index() -> None:
    _, indices = dsm.ops.moe_gate(torch.zeros(2, 6), 4)
    assert indices.tolist() == [[0, 1, 2, 3]] * 2
    _, indices = dsm.ops.moe_gate(torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0, 0.0]]), 4)
    assert indices.tolist() == [[1, 3, 4, 0]]
    # Groups {0,1} {2,3} {4,5} are worth the same: the first two are taken.
    _, indices = dsm.ops.moe_gate(torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 0.0]]), 2, n_group=3, topk_group=2)
    assert indices.tolist() == [[1, 2]]


def test_order_is_by_selection_value_and_weights_are_without_bias() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    bias = torch.tensor([0.0, 0.0, 5.0])
    weights, indices = dsm.ops.moe_gate(logits, 2, bias=bias, scoring="sigmoid", renormalize=False)
    assert indices.tolist() == [[2, 0]]
    assert torch.allclose(weights, torch.sigmoid(torch.tensor([[0.0, 2.0]])))


def test_masked_experts_are_chosen_last() -> None:
    infinity = float("inf")
    weights, indices = dsm.ops.moe_gate(torch.tensor([[-infinity, 1.0, -infinity]]), 2)
    assert indices.tolist() == [[1, 0]]
    assert weights.tolist() == [[1.0, 0.0]]
    _, indices = dsm.ops.moe_gate(torch.tensor([[3.0, 1.0, 2.0]]), 2, bias=torch.tensor([-infinity, 0, 0]))
    assert indices.tolist() == [[2, 1]]


@pytest.mark.parametrize("scoring", SCORINGS)
def test_extreme_logits_stay_finite(scoring: str) -> None:
    logits = torch.tensor([[-3e38, -200.0, 0.0, 90.0], [-104.0, -103.0, -102.0, -101.0]], requires_grad=True)
    for normalize in NORMALIZE:
        weights, _ = dsm.ops.moe_gate(logits, 2, scoring=scoring, **normalize)
        (grad,) = torch.autograd.grad(weights.sum(), logits)
        assert weights.isfinite().all()
        assert grad.isfinite().all()


def test_capacity_keeps_the_first_pairs_by_token_then_slot() -> None:
    logits = torch.zeros(5, 3)
    weights, indices = dsm.ops.moe_gate(logits, 2, capacity_rows=3, renormalize_after_drop=True)
    assert indices.tolist() == [[0, 1]] * 3 + [[-1, -2]] * 2
    assert weights.tolist() == [[0.5, 0.5]] * 3 + [[0.0, 0.0]] * 2
    table = torch.tensor([[1, 1, 1]])
    _, indices = dsm.ops.moe_gate(logits, 3, token_ids=torch.zeros(5).long(), tid2eid=table, capacity_rows=4)
    assert indices.tolist() == [[1, 1, 1], [1, -2, -2]] + [[-2, -2, -2]] * 3


def test_all_dropped() -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    for normalize in NORMALIZE:
        weights, indices = dsm.ops.moe_gate(logits, 2, capacity_rows=0, **normalize)
        assert (indices < 0).all()
        assert (weights == 0).all()
        (grad,) = torch.autograd.grad(weights.sum(), logits)
        assert (grad == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_without_an_order_are_refused(bad: float) -> None:
    logits = torch.randn(300, 6)
    logits[217, 4] = bad
    logits[290, 1] = bad
    with pytest.raises(ValueError, match=r"logits must be below .inf.* in row 217"):
        dsm.ops.moe_gate(logits, 2)
    with pytest.raises(ValueError, match="not all -inf"):
        dsm.ops.moe_gate(torch.full((2, 3), -float("inf")), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"topk": 5}, "topk must be at most the number of experts, 4, got 5"),
        ({"topk": 0}, "topk must be at least 1, got 0"),
        ({"topk": 2, "scoring": "relu"}, "scoring must be softmax|sigmoid|sqrtsoftplus, got 'relu'"),
        ({"topk": 2, "bias": torch.zeros(3)}, r"bias must be \[experts\] = \[4\] float32, got \[3\]"),
        ({"topk": 2, "bias": torch.zeros(4).double()}, "bias must be .* float32"),
        ({"topk": 2, "bias": torch.tensor([0, 0, float("nan"), 0])}, "bias must be below .* for expert 2"),
        ({"topk": 2, "n_group": 3}, "n_group must be a divisor of the number of experts, 4, got 3"),
        ({"topk": 2, "n_group": 0}, "n_group must be a divisor"),
        ({"topk": 2, "n_group": 2, "topk_group": 3}, "topk_group must be from 1 to n_group = 2, got 3"),
        ({"topk": 3, "n_group": 2, "topk_group": 1}, "topk must be at most the 2 experts that can be selected, got 3"),
        ({"topk": 2, "capacity_rows": -2}, "capacity_rows must be at least 0"),
        ({"topk": 2, "token_ids": torch.zeros(3).long()}, "token_ids must be given exactly when tid2eid is"),
        ({"topk": 2, "tid2eid": torch.zeros(9, 2).int()}, "token_ids must be given exactly when tid2eid is"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        dsm.ops.moe_gate(torch.zeros(3, 4), **arguments)


@pytest.mark.parametrize(
    ("token_ids", "table", "message"),
    [
        ([0, 1, 9], [[0, 1]] * 9, "token_ids must be from 0 to vocab - 1 = 8, got 9"),
        ([0, -1, 2], [[0, 1]] * 9, "token_ids must be from 0 to .* got -1"),
        ([0, 1, 2], [[0, 1], [2, 4], [0, 1]], "tid2eid must be from 0 to experts - 1 = 3, got 4"),
        ([0, 1, 2], [[0, 1], [2, -1], [0, 1]], "tid2eid must be from 0 to .* got -1"),
        ([0, 1, 2], [[0, 1, 2]] * 9, r"tid2eid must be \[vocab, topk\] = \[any, 2\]"),
        ([0, 1], [[0, 1]] * 9, r"token_ids must be \[tokens\] = \[3\]"),
    ],
)
def test_bad_tables_are_refused(token_ids: list[int], table: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dsm.ops.moe_gate(torch.zeros(3, 4), 2, token_ids=torch.tensor(token_ids), tid2eid=torch.tensor(table))


def test_bad_logits_are_refused() -> None:
    for logits in (torch.zeros(3), torch.zeros(3, 4).half(), torch.zeros(3, 4).int(), torch.zeros(4, 3).T):
        with pytest.raises(ValueError, match="logits must be"):
            dsm.ops.moe_gate(logits, 2)
    with pytest.raises(ValueError, match="experts must be from 1"):
        dsm.ops.moe_gate(torch.zeros(3, 0), 1)


def test_backward_refuses_experts_that_do_not_exist() -> None:
    for bad in (4, 2**31 - 1, -(2**31), -5):
        indices = torch.tensor([[0, bad]], dtype=torch.int32)
        with pytest.raises(ValueError, match="indices must be experts below 4"):
            torch.ops.dsm.moe_gate_backward(torch.ones(1, 2), torch.zeros(1, 4), indices, "softmax", "none", 1.0)


def test_strided_rows_and_no_tokens() -> None:
    wide = torch.randn(6, 40)
    part = wide[:, 3:19]
    for one, other in zip(dsm.ops.moe_gate(part, 3), dsm.ops.moe_gate(part.contiguous(), 3), strict=True):
        assert torch.equal(one, other)
    weights, indices = dsm.ops.moe_gate(torch.zeros(0, 4), 2, capacity_rows=0)
    assert weights.shape == indices.shape == (0, 2)


def test_same_bits_for_any_number_of_threads() -> None:
    logits = torch.randn(3000, 24, requires_grad=True)

    def run() -> list[Tensor]:
        weights, indices = dsm.ops.moe_gate(logits, 4, capacity_rows=400)
        return [weights, indices, *torch.autograd.grad(weights.square().sum(), logits)]

    assert_same_bits(run)


def test_second_derivative_is_refused() -> None:
    logits = torch.randn(2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(dsm.ops.moe_gate(logits, 2)[0].square().sum(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_opcheck() -> None:
    logits = torch.randn(5, 8, requires_grad=True)
    plain = (None, None, None, "softmax", "selected", 1.0, 1, 1, -1)
    torch.library.opcheck(torch.ops.dsm.moe_gate.default, (logits, 3, *plain))
    table = (torch.zeros(8), torch.arange(5), torch.zeros(9, 3).int(), "sigmoid", "kept", 2.0, 4, 2, 2)
    torch.library.opcheck(torch.ops.dsm.moe_gate.default, (logits, 3, *table))
    torch.library.opcheck(torch.ops.dsm.moe_gate.default, (logits[:0], 3, *plain))


def test_compile_fullgraph() -> None:
    logits = torch.randn(5, 8, requires_grad=True)

    def route(v: Tensor) -> tuple[Tensor, Tensor]:
        return dsm.ops.moe_gate(v, 3, scoring="sigmoid", capacity_rows=2)

    weights, indices = torch.compile(route, fullgraph=True, backend="aot_eager")(logits)
    expected, expected_indices = route(logits)
    assert torch.equal(weights, expected)
    assert torch.equal(indices, expected_indices)
    weights.sum().backward()
    assert logits.grad is not None
