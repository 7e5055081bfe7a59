# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ds_flashdmla_moe as dsm
from tolerance import FLOATING, assert_close

SHAPES = [(1, 1), (3, 7), (64, 128), (65, 130), (2, 3, 33), (1, 4096), (0, 8), (5,)]


def truth(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x = x.double()
    y = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight.double()


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", ["none", "same", "float32"])
def test_forward_and_backward_match_float64(shape: tuple[int, ...], dtype: torch.dtype, weighted: str) -> None:
    if weighted == "float32" and dtype == torch.float64:
        pytest.skip("float64 rows take float64 weights")
    x = torch.randn(shape).mul(3).to(dtype).requires_grad_()
    weight = None
    if weighted != "none":
        weight = torch.randn(shape[-1]).to(dtype if weighted == "same" else torch.float32).requires_grad_()
    dy = torch.randn(shape).to(dtype)

    y = dsm.ops.rms_norm(x, weight, 1e-6)
    y.backward(dy)

    wide_x = x.detach().double().requires_grad_()
    wide_weight = None if weight is None else weight.detach().double().requires_grad_()
    expected = truth(wide_x, wide_weight, 1e-6)
    expected.backward(dy.double())
    assert y.dtype == dtype
    assert_close("y", y, expected)
    # dx is the difference of two terms of this size, and both nearly cancel in short rows.
    rstd = torch.rsqrt(wide_x.detach().square().mean(-1, keepdim=True) + 1e-6)
    terms = rstd * dy.double() * (1 if wide_weight is None else wide_weight.detach())
    assert_close("dx", x.grad, wide_x.grad, scale=float(terms.abs().max()) if terms.numel() else 0.0)
    if weight is not None:
        assert_close("dweight", weight.grad, wide_weight.grad)


def test_gradcheck() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: dsm.ops.rms_norm(a, b, 1e-6), (x, weight))
    assert torch.autograd.gradcheck(lambda a: dsm.ops.rms_norm(a, None, 1e-6), (x,))


def test_strided_rows() -> None:
    wide = torch.randn(6, 40)
    part = wide[:, 3:24]
    assert torch.equal(dsm.ops.rms_norm(part), dsm.ops.rms_norm(part.contiguous()))


def test_nan_row_stays_alone() -> None:
    x = torch.randn(4, 16)
    clean = dsm.ops.rms_norm(x.clone())
    x[2] = float("nan")
    y = dsm.ops.rms_norm(x)
    assert y[2].isnan().all()
    assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


def test_same_bits_for_any_number_of_threads() -> None:
    x = torch.randn(1000, 96, requires_grad=True)
    weight = torch.randn(96, requires_grad=True)

    def run(threads: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            y = dsm.ops.rms_norm(x, weight)
            return [y, *torch.autograd.grad(y.square().sum(), (x, weight))]
        finally:
            torch.set_num_threads(before)

    for one, two in zip(run(1), run(2), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(2, 4), torch.zeros(3), r"weight must be \[hidden\] = \[4\]"),
        (torch.zeros(2, 4), torch.zeros(4, dtype=torch.float16), "weight must be"),
        (torch.zeros(2, 4, dtype=torch.int32), None, "x must be .* got .* int32"),
        (torch.tensor(1.0), None, "at least one dimension"),
    ],
)
def test_bad_arguments_are_refused(x: Tensor, weight: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dsm.ops.rms_norm(x, weight)


def test_negative_eps_is_refused() -> None:
    with pytest.raises(ValueError, match="eps must be at least 0"):
        dsm.ops.rms_norm(torch.zeros(2, 4), eps=-1.0)


def test_second_derivative_is_refused() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(dsm.ops.rms_norm(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("shape", [(3, 8), (0, 8)], ids=str)
def test_opcheck(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    weight = torch.randn(shape[-1], requires_grad=True)
    torch.library.opcheck(torch.ops.dsm.rms_norm.default, (x, weight, 1e-6))
    torch.library.opcheck(torch.ops.dsm.rms_norm.default, (x.detach(), None, 1e-6))


def test_compile_fullgraph() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    weight = torch.randn(8, requires_grad=True)
    compiled = torch.compile(dsm.ops.rms_norm, fullgraph=True, backend="aot_eager")
    y = compiled(x, weight)
    assert torch.equal(y, dsm.ops.rms_norm(x, weight))
    y.sum().backward()
    assert x.grad is not None
