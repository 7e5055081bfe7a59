# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import math
from typing import NamedTuple

import moe_truth
import pytest
import torch
from torch import Tensor

import ds_flashdmla_moe as dsm
from threads import assert_same_bits
from tolerance import FLOATING, assert_close


class Case(NamedTuple):
    tokens: int
    topk: int
    experts: int
    hidden: int
    intermediate: int
    shared: int = 0
    limit: float | None = None
    routing: str = "random"


CASES = [
    Case(1, 1, 1, 1, 1),
    Case(9, 2, 4, 7, 5, shared=3, limit=0.5),
    Case(1, 4, 16, 33, 20, shared=9),
    Case(30, 3, 5, 40, 270, shared=300),  # more than one tile of columns
    Case(30, 2, 5, 16, 8, routing="one"),  # one expert takes everything
    Case(30, 2, 5, 16, 8, shared=4, routing="dropped"),
    Case(30, 2, 5, 16, 8, routing="dropped"),
    Case(30, 4, 3, 16, 8, limit=1.0, routing="repeated"),  # a token visits an expert twice, as hash tables may say
]


def routing(case: Case) -> Tensor:
    """About a third of the pairs is dropped, and with many experts some get no visit."""
    shape = (case.tokens, case.topk)
    if case.routing == "one":
        return torch.full(shape, 3, dtype=torch.int32)
    if case.routing == "dropped":
        return torch.full(shape, -1, dtype=torch.int32)
    if case.routing == "repeated":
        return torch.randint(case.experts, shape, dtype=torch.int32)
    indices = torch.stack([torch.randperm(case.experts)[: case.topk] for _ in range(case.tokens)]).int()
    return torch.where(torch.rand(shape) < 0.3, -1 - indices, indices) if case.tokens > 1 else indices


def inputs_of(case: Case, dtype: torch.dtype) -> list[Tensor | None]:
    """x, weights, w13, w2, shared_w13, shared_w2."""
    t, h, i, s = case.tokens, case.hidden, case.intermediate, case.shared
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors: list[Tensor | None] = [torch.randn(t, h).to(dtype), torch.rand(t, case.topk, dtype=wide)]
    shapes = [(case.experts, 2 * i, h), (case.experts, h, i)] + ([(2 * s, h), (h, s)] if s else [])
    tensors += [(torch.randn(shape) / shape[-1] ** 0.5).to(dtype) for shape in shapes]
    return tensors if s else [*tensors, None, None]


def run(x: Tensor, weights: Tensor, indices: Tensor, *matrices: Tensor | None, limit: float | None) -> Tensor:
    return dsm.ops.moe_ffn(x, weights, indices, *matrices, swiglu_limit=limit)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward_match_float64(case: Case, dtype: torch.dtype) -> None:
    indices = routing(case)
    inputs = inputs_of(case, dtype)
    given = [t.requires_grad_() for t in inputs if t is not None]
    dy = torch.randn(case.tokens, case.hidden).to(dtype)
    limit = math.inf if case.limit is None else case.limit

    x, weights, *matrices = inputs
    y, z, shared_z = torch.ops.dsm.moe_ffn(x, weights, indices, *matrices, limit, True)
    gradients = torch.autograd.grad(y, given, dy)

    wide = [moe_truth.wide(t) for t in inputs]
    wide_x, wide_weights, *wide_matrices = wide
    slots = indices.tolist()
    expected = moe_truth.experts(wide_x, wide_weights, slots, *wide_matrices, limit=case.limit)
    assert_close("y", y, expected)

    kept = sorted((e, t) for t, row in enumerate(slots) for e in row if e >= 0)
    assert (z[len(kept) :] == 0).all()
    if kept:
        assert_close("z", z[: len(kept)], torch.stack([matrices[0][e].double() @ x[t].double() for e, t in kept]))
    # The backward pass starts from the pre-activations as they are stored.
    stored = {"z": z, "shared_z": shared_z if case.shared else None}
    expected = moe_truth.experts(wide_x, wide_weights, slots, *wide_matrices, limit=case.limit, **stored)
    if not expected.requires_grad:  # no token visits any expert
        assert all((gradient == 0).all() for gradient in gradients)
        return
    names = ["dx", "dweights", "dw13", "dw2", "dshared_w13", "dshared_w2"]
    truths = torch.autograd.grad(expected, [t for t in wide if t is not None], dy.double(), materialize_grads=True)
    for name, gradient, truth in zip(names, gradients, truths, strict=False):
        assert_close(name, gradient, truth)


@pytest.mark.parametrize("limit", [None, 0.4])
@pytest.mark.parametrize("shared", [0, 2])
def test_gradcheck(shared: int, limit: float | None) -> None:
    case = Case(5, 2, 3, 3, 2, shared=shared)
    indices = routing(case)
    given = [t.requires_grad_() for t in inputs_of(case, torch.float64) if t is not None]
    assert torch.autograd.gradcheck(lambda x, w, *m: run(x, w, indices, *m, limit=limit), given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_enough_for_several_groups_and_tiles(dtype: torch.dtype) -> None:
    """More visits than one group and more tokens than one tile hold, against a product per expert in float64."""
    case = Case(1500, 3, 6, 150, 40, shared=24)
    indices = routing(case)
    x, weights, w13, w2, shared_w13, shared_w2 = (t.requires_grad_() for t in inputs_of(case, dtype))
    y = run(x, weights, indices, w13, w2, shared_w13, shared_w2, limit=None)
    inputs = (x, weights, w13, w2, shared_w13, shared_w2)
    gradients = torch.autograd.grad(y, inputs, torch.ones_like(y))

    wide = [moe_truth.wide(t) for t in inputs]
    expected = moe_truth.swiglu(wide[0] @ wide[4].T, None) @ wide[5].T
    for e in range(case.experts):
        factor = (wide[1] * (indices == e)).sum(1, keepdim=True)
        expected = expected + factor * (moe_truth.swiglu(wide[0] @ wide[2][e].T, None) @ wide[3][e].T)
    assert_close("y", y, expected)
    truths = torch.autograd.grad(expected, wide, torch.ones_like(expected))
    for name, gradient, truth in zip(["dx", "dweights", "dw13", "dw2", "ds13", "ds2"], gradients, truths, strict=True):
        # In bfloat16 z is stored rounded, which moves the gradients by parts of an ulp of their largest terms.
        if dtype == torch.float32:
            assert_close(name, gradient, truth)
        else:
            worst = float((gradient.double() - truth).abs().max() / truth.abs().max())
            print(f"{name}: {worst:.2e} of the largest gradient (bfloat16)")
            assert worst < 2.0**-7


def test_frozen_matrices_need_no_gradient() -> None:
    case = Case(9, 2, 4, 7, 5, shared=3)
    indices, inputs = routing(case), inputs_of(case, torch.float32)
    x, weights, *matrices = inputs
    everything = [t.clone().requires_grad_() for t in inputs]
    all_gradients = torch.autograd.grad(
        run(everything[0], everything[1], indices, *everything[2:], limit=None).sum(), everything
    )
    x.requires_grad_()
    (dx,) = torch.autograd.grad(run(x, weights, indices, *matrices, limit=None).sum(), x)
    assert torch.equal(dx, all_gradients[0])
    matrices[1].requires_grad_()
    (dw2,) = torch.autograd.grad(run(x.detach(), weights, indices, *matrices, limit=None).sum(), matrices[1])
    assert torch.equal(dw2, all_gradients[3])


def test_without_gradients_nothing_is_kept() -> None:
    case = Case(9, 2, 4, 7, 5, shared=3)
    indices, (x, weights, *matrices) = routing(case), inputs_of(case, torch.float32)
    y, z, shared_z = torch.ops.dsm.moe_ffn(x, weights, indices, *matrices, math.inf, False)
    assert z.numel() == shared_z.numel() == 0
    assert torch.equal(y, torch.ops.dsm.moe_ffn(x, weights, indices, *matrices, math.inf, True)[0])
    y, _, _ = torch.ops.dsm.moe_ffn(x.requires_grad_(), weights, indices, *matrices, math.inf, False)
    with pytest.raises(ValueError, match="keep_z must be true"):
        y.sum().backward()


def test_nothing_permuted_is_saved() -> None:
    """For the backward pass the inputs and the pre-activations are kept, and no more."""
    case = Case(64, 2, 4, 16, 8, shared=4)
    indices = routing(case)
    given = [t.requires_grad_() for t in inputs_of(case, torch.float32)]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        run(given[0], given[1], indices, *given[2:], limit=None)
    owned = {t.data_ptr() for t in [*given, indices]}
    extra = sorted(tuple(t.shape) for t in saved if t.data_ptr() not in owned)
    assert extra == [(64, 8), (128, 16)]


def test_no_tokens_and_nan_in_dropped_tokens() -> None:
    case = Case(6, 2, 4, 7, 5)
    indices, (x, weights, *matrices) = routing(case), inputs_of(case, torch.float32)
    indices[3] = -1
    x[3], weights[3] = math.nan, math.nan
    given = [x, weights, *matrices[:2]]
    for t in given:
        t.requires_grad_()
    y = run(x, weights, indices, *matrices, limit=None)
    assert (y[3] == 0).all()
    gradients = torch.autograd.grad(y.sum(), given)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][3] == 0).all()

    y = run(x[:0], weights[:0], indices[:0], *matrices, limit=None)
    assert y.shape == (0, 7)
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(y.sum(), given))


def test_strided_x() -> None:
    case = Case(9, 2, 4, 7, 5)
    indices, (x, weights, *matrices) = routing(case), inputs_of(case, torch.float32)
    spread = torch.randn(9, 20)
    spread[:, 4:11] = x
    assert torch.equal(
        run(spread[:, 4:11], weights, indices, *matrices, limit=None), run(x, weights, indices, *matrices, limit=None)
    )


def test_bad_arguments_are_refused() -> None:
    case = Case(3, 2, 4, 8, 6, shared=5)
    indices, inputs = torch.zeros(3, 2, dtype=torch.int32), inputs_of(case, torch.float32)
    x, weights, w13, w2, shared_w13, shared_w2 = inputs
    for arguments, message in [
        ((x[0], weights, indices, w13, w2), "x must be of 2 dimensions"),
        ((x.int(), weights, indices, w13, w2), r"x must be .* got .* int32"),
        ((x, weights.double(), indices, w13, w2), r"weights must be \[tokens, topk\] = \[3, 2\] float32"),
        ((x, weights, indices.long(), w13, w2), r"indices must be .* int32, got .* int64"),
        ((x, weights, indices + 4, w13, w2), "indices must be below the number of experts, 4, got 4"),
        ((x, weights, indices, w13[:, :11], w2), "w13 must be of an even number of rows"),
        ((x, weights, indices, w13, w2[:3]), r"w2 must be .* = \[4, 8, 6\] float32, got \[3, 8, 6\]"),
        ((x, weights, indices, w13, w2.half()), r"w2 must be .* float32, got .* float16"),
        ((x, weights, indices, w13, w2, shared_w13), "shared_w2 must be given exactly when shared_w13 is"),
        ((x, weights, indices, w13, w2, None, shared_w2), "shared_w2 must be given exactly when shared_w13 is"),
        ((x, weights, indices, w13, w2, shared_w13[:, :7], shared_w2), "shared_w13 must be"),
        ((x, weights, indices, w13, w2, shared_w13, shared_w2, 0.0), "swiglu_limit must be above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            dsm.ops.moe_ffn(*arguments)


def test_same_bits_for_any_number_of_threads() -> None:
    case = Case(1300, 3, 5, 140, 70, shared=30)
    indices = routing(case)
    given = [t.requires_grad_() for t in inputs_of(case, torch.float32)]

    def everything() -> list[Tensor]:
        y = run(given[0], given[1], indices, *given[2:], limit=1.0)
        return [y, *torch.autograd.grad(y.square().sum(), given)]

    assert_same_bits(everything)


def test_opcheck_and_compile() -> None:
    case = Case(5, 2, 3, 4, 6, shared=3)
    indices = routing(case)
    given = [t.requires_grad_() for t in inputs_of(case, torch.float32)]
    x, weights, *matrices = given
    torch.library.opcheck(torch.ops.dsm.moe_ffn.default, (x, weights, indices, *matrices, 1.0, True))
    torch.library.opcheck(
        torch.ops.dsm.moe_ffn.default,
        (x.detach(), weights.detach(), indices, *[m.detach() for m in matrices], 1.0, False),
    )
    plain = (x, weights, indices, *matrices[:2], None, None, math.inf, True)
    torch.library.opcheck(torch.ops.dsm.moe_ffn.default, plain)
    compiled = torch.compile(dsm.ops.moe_ffn, fullgraph=True, backend="aot_eager")
    y = compiled(x, weights, indices, *matrices)
    assert torch.equal(y, dsm.ops.moe_ffn(x, weights, indices, *matrices))
    y.sum().backward()
    assert all(t.grad is not None for t in given)
