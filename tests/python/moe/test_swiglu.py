# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import math

import moe_truth
import pytest
import torch
from torch import Tensor

import ds_flashdmla_moe as dsm
from threads import assert_same_bits
from tolerance import FLOATING, assert_close

SHAPES = [(1, 2), (3, 14), (17, 1026), (2, 3, 30), (0, 8), (4, 0), (10,)]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("limit", [None, 1.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward_match_float64(shape: tuple[int, ...], limit: float | None, dtype: torch.dtype) -> None:
    z = torch.randn(shape).mul(4).to(dtype).requires_grad_()
    dy = torch.randn(*shape[:-1], shape[-1] // 2).to(dtype)
    y = dsm.ops.swiglu(z, limit)
    (dz,) = torch.autograd.grad(y, z, dy)
    wide = moe_truth.wide(z)
    expected = moe_truth.swiglu(wide, limit)
    (expected_dz,) = torch.autograd.grad(expected, wide, dy.double())
    assert y.dtype == dtype
    assert_close("y", y, expected)
    assert_close("dz", dz, expected_dz)


def test_gradcheck() -> None:
    z = torch.randn(3, 8, dtype=torch.float64).mul(2).requires_grad_()
    assert torch.autograd.gradcheck(dsm.ops.swiglu, (z,))
    assert torch.autograd.gradcheck(lambda v: dsm.ops.swiglu(v, 0.7), (z,))


def test_each_element_keeps_its_relative_accuracy() -> None:
    """Far out on both sides silu and its derivative are small or close to linear; their error must be relative."""
    g = torch.linspace(-60, 60, 2401)
    z = torch.cat([g, torch.ones_like(g)]).requires_grad_()
    y = dsm.ops.swiglu(z)
    (dz,) = torch.autograd.grad(y.sum(), z)
    wide = g.double()
    sigma, rest = torch.sigmoid(wide), torch.sigmoid(-wide)
    for name, value, truth in [("silu", y, wide * sigma), ("slope", dz[:2401], sigma + wide * sigma * rest)]:
        # The slope crosses zero at -1.28, where only the size of its two terms can count.
        error = (value.detach().double() - truth).abs() / torch.maximum(truth.abs(), sigma)
        worst = float(error.max())
        print(f"{name}: worst relative error {worst:.2e}")
        assert worst < 6e-7


def test_beyond_the_limit_the_gradient_is_zero() -> None:
    z = torch.tensor([[3.0, -3.0, 1.0, 1.0, 1.0, 1.0, 5.0, -5.0]], requires_grad=True)  # four gates, four ups
    y = dsm.ops.swiglu(z, 2.0)
    (dz,) = torch.autograd.grad(y.sum(), z)
    silu = torch.nn.functional.silu(torch.tensor([2.0, -3.0, 1.0, 1.0]))
    assert torch.allclose(y[0], silu * torch.tensor([1.0, 1.0, 2.0, -2.0]))
    assert (dz == 0).tolist() == [[True, False, False, False, False, False, True, True]]
    at_limit = torch.full((1, 2), 2.0, requires_grad=True)
    (dz,) = torch.autograd.grad(dsm.ops.swiglu(at_limit, 2.0), at_limit)
    assert (dz != 0).all(), "at the limit itself the derivative is the one from inside"


def test_nan_stays_where_it_is() -> None:
    z = torch.randn(4, 16)
    clean = dsm.ops.swiglu(z, 1.0)
    z[1, 3] = z[2, 11] = math.nan
    y = dsm.ops.swiglu(z, 1.0)
    assert y.isnan().nonzero().tolist() == [[1, 3], [2, 3]]
    assert torch.equal(y[~y.isnan()], clean[~y.isnan()])


def test_strided_rows() -> None:
    part = torch.randn(6, 40)[:, 3:23]
    assert torch.equal(dsm.ops.swiglu(part), dsm.ops.swiglu(part.contiguous()))


def test_bad_arguments_are_refused() -> None:
    for limit in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="limit must be above 0"):
            dsm.ops.swiglu(torch.zeros(2, 4), limit)
    with pytest.raises(ValueError, match="even number of columns"):
        dsm.ops.swiglu(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="at least one dimension"):
        dsm.ops.swiglu(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"z must be .* got .* int32"):
        dsm.ops.swiglu(torch.zeros(2, 4, dtype=torch.int32))


def test_same_bits_for_any_number_of_threads() -> None:
    z = torch.randn(500, 202, requires_grad=True)

    def run() -> list[Tensor]:
        y = dsm.ops.swiglu(z, 1.0)
        return [y, *torch.autograd.grad(y.square().sum(), z)]

    assert_same_bits(run)


def test_opcheck_and_compile() -> None:
    z = torch.randn(3, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.dsm.swiglu.default, (z, 1.0))
    torch.library.opcheck(torch.ops.dsm.swiglu.default, (z[:0], math.inf))
    y = torch.compile(dsm.ops.swiglu, fullgraph=True, backend="aot_eager")(z)
    assert torch.equal(y, dsm.ops.swiglu(z))
    y.sum().backward()
    assert z.grad is not None
