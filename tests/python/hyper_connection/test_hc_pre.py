# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import math
from typing import Any

import hyper_connection_truth as truth
import pytest
import torch
from torch import Tensor

import ds_flashdmla_moe as dsm
from threads import assert_same_bits
from tolerance import FLOATING, assert_close

# x's shape: [..., hc, hidden].
SHAPES = [(5, 4, 24), (1, 1, 1), (3, 2, 7), (2, 3, 4, 33), (70, 4, 300), (4, 5, 16), (0, 4, 8)]
NAMES = ("mixed", "post", "comb")


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    hc, hidden = shape[-2:]
    x = torch.randn(shape).mul(3).to(dtype)
    return [t.requires_grad_() for t in (x, *truth.parameters(hc, hidden, (2 + hc) * hc, 3, dtype))]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward_match_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = inputs(shape, dtype)
    outputs = dsm.ops.hc_pre(*arguments)
    wide = truth.wide(*arguments)
    expected = truth.pre(*wide)
    for name, output, value in zip(NAMES, outputs, expected, strict=True):
        assert output.dtype == (dtype if name == "mixed" else arguments[1].dtype)
        assert_close(name, output, value)

    gradients = [torch.randn_like(output) for output in outputs]
    found = torch.autograd.grad(outputs, arguments, gradients)
    wanted = torch.autograd.grad(expected, wide, [g.double() for g in gradients])
    for name, value, true in zip(("dx", "dfn", "dbase", "dscale"), found, wanted, strict=True):
        assert_close(name, value, true)


def golden(dtype: torch.dtype) -> list[Tensor]:
    """Four streams of one element 1, whose first alone is projected: mixes[j] = sin(j + 1)."""
    j = torch.arange(24, dtype=torch.float64)
    fn = torch.zeros(24, 4, dtype=torch.float64)
    fn[:, 0] = torch.sin(j + 1)
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    return [t.to(dtype) for t in (torch.ones(1, 4, 1), fn, 0.1 * torch.cos(j), scale)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_golden_values(dtype: torch.dtype) -> None:
    x, fn, base, scale = golden(dtype)
    wanted = {
        "post": [0.5283857, 0.8751305, 1.3596656, 1.4871939],
        "comb": [
            [0.4194917, 0.1966519, 0.1593736, 0.2244819],
            [0.0441642, 0.4764562, 0.4472875, 0.0320910],
            [0.0038114, 0.0212904, 0.2837327, 0.6911646],
            [0.5325318, 0.3056005, 0.1096052, 0.0522615],
        ],
    }
    # norm_eps 0 keeps the mean square of ones exactly 1.
    _, post, comb = dsm.ops.hc_pre(x, fn, base, scale, norm_eps=0.0)
    for name, value in (("post", post[0]), ("comb", comb[0])):
        error = float((value.double() - torch.tensor(wanted[name], dtype=torch.float64)).abs().max())
        print(f"{name}: {error:.1e}")
        assert error < 2e-7
    for dim in (-1, -2):
        assert torch.allclose(comb.double().sum(dim), torch.tensor(0.999999, dtype=torch.float64), rtol=0, atol=1e-6)
    # pre: one stream at a time is 1, with the squares that are missing made up for by fn.
    for j, weight in enumerate([0.6273207, 0.6244977, 0.5072368, 0.3828671]):
        lone = torch.zeros(1, 4, 1, dtype=dtype)
        lone[0, j] = 1
        shifted = torch.zeros_like(fn)
        shifted[:, j] = fn[:, 0] / 2
        mixed, _, _ = dsm.ops.hc_pre(lone, shifted, base, scale, norm_eps=0.0)
        assert abs(float(mixed) - weight) < 2e-7


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_gradcheck(iterations: int) -> None:
    arguments = inputs((2, 3, 4), torch.float64)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        return dsm.ops.hc_pre(*tensors, iterations=iterations, eps=0.01, norm_eps=0.1, post_mult=1.5)

    assert torch.autograd.gradcheck(function, arguments)


def test_iterations_eps_and_post_mult_are_honoured() -> None:
    arguments = inputs((3, 4, 8), torch.float64)
    changes: list[dict[str, Any]] = [{"iterations": 1}, {"iterations": 3}, {"eps": 0.1}, {"norm_eps": 0.5}]
    for changed in [*changes, {"post_mult": 1.0}]:
        for output, value in zip(dsm.ops.hc_pre(*arguments, **changed), truth.pre(*arguments, **changed), strict=True):
            assert_close(str(changed), output, value)


def test_saturated_mixes_stay_finite() -> None:
    """Softmaxes of zeros and ones, in which whole columns have nothing but eps."""
    x, fn, base, scale = (t.detach() for t in inputs((4, 4, 16), torch.float32))
    arguments = [t.requires_grad_() for t in (x, fn, base, scale.fill_(1e4))]
    outputs = dsm.ops.hc_pre(*arguments)
    assert all(output.isfinite().all() for output in outputs)
    gradients = torch.autograd.grad([o.sum() for o in outputs], arguments)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_nan_token_stays_alone_and_tokens_do_not_depend_on_their_company() -> None:
    x, *parameters = (t.detach() for t in inputs((6, 4, 40), torch.float32))
    clean = dsm.ops.hc_pre(x, *parameters)
    dirty = x.clone()
    dirty[2] = math.nan
    for output, value in zip(dsm.ops.hc_pre(dirty, *parameters), clean, strict=True):
        assert output[2].isnan().all()
        assert torch.equal(output[[0, 1, 3, 4, 5]], value[[0, 1, 3, 4, 5]])
    for token in range(6):
        for output, value in zip(dsm.ops.hc_pre(x[token : token + 1], *parameters), clean, strict=True):
            assert torch.equal(output[0], value[token])


def test_strided_streams() -> None:
    _, *parameters = (t.detach() for t in inputs((5, 4, 6), torch.float32))
    wide = torch.randn(4, 5, 9)
    copied = torch.randn(5, 1, 6)  # a model's first residual is one embedding in every stream
    for view in (wide.transpose(0, 1)[..., 2:8], copied.expand(5, 4, 6)):
        dense = view.contiguous().requires_grad_()
        strided = view.detach().requires_grad_()
        ours, theirs = dsm.ops.hc_pre(strided, *parameters), dsm.ops.hc_pre(dense, *parameters)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
        (da,) = torch.autograd.grad([o.square().sum() for o in ours], strided)
        (db,) = torch.autograd.grad([o.square().sum() for o in theirs], dense)
        assert torch.equal(da, db)


def test_without_tokens_the_parameters_have_zero_gradients() -> None:
    x, *parameters = inputs((0, 4, 8), torch.float32)
    outputs = dsm.ops.hc_pre(x, *parameters)
    for gradient in torch.autograd.grad([o.sum() for o in outputs], parameters):
        assert (gradient == 0).all()


def test_same_bits_for_any_number_of_threads() -> None:
    arguments = inputs((150, 4, 70), torch.bfloat16)

    def run() -> list[Tensor]:
        outputs = dsm.ops.hc_pre(*arguments)
        return [*outputs, *torch.autograd.grad([o.float().square().sum() for o in outputs], arguments)]

    assert_same_bits(run)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(4, 8)}, r"x must be \[..., tokens, hc, hidden\]"),
        ({"x": torch.zeros(2, 4, 8, dtype=torch.int32)}, "x must be .* got .* int32"),
        ({"x": torch.zeros(2, 4, 0)}, "at least 1 stream of at least 1 element"),
        ({"x": torch.zeros(2, 0, 8)}, "at least 1 stream of at least 1 element"),
        ({"x": torch.zeros(2, 4, 16)[..., ::2]}, "x must be contiguous in its last dimension"),
        ({"fn": torch.zeros(24, 31)}, r"fn must be \[outputs, hc \* hidden\] = \[24, 32\]"),
        ({"fn": torch.zeros(24, 32, dtype=torch.bfloat16)}, "fn must be .* float32"),
        ({"base": torch.zeros(23)}, "base must be"),
        ({"scale": torch.zeros(1)}, "scale must be"),
        ({"iterations": 0}, "iterations must be between 1 and 1000"),
        ({"iterations": 2**40}, "iterations must be between 1 and 1000"),
        ({"iterations": -(2**63)}, "iterations must be between 1 and 1000"),
        ({"eps": -1.0}, "eps must be at least 0"),
        ({"norm_eps": math.nan}, "norm_eps must be at least 0"),
        ({"post_mult": math.inf}, "post_mult must be a finite number"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(changed: dict[str, Any], message: str) -> None:
    arguments = {
        "x": torch.zeros(2, 4, 8),
        "fn": torch.zeros(24, 32),
        "base": torch.zeros(24),
        "scale": torch.zeros(3),
    } | changed
    with pytest.raises(ValueError, match=message):
        dsm.ops.hc_pre(**arguments)


def test_second_derivative_is_refused() -> None:
    x, *parameters = inputs((2, 4, 8), torch.float32)
    (grad,) = torch.autograd.grad(dsm.ops.hc_pre(x, *parameters)[0].sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_opcheck_and_compile() -> None:
    arguments = inputs((3, 4, 8), torch.float32)
    torch.library.opcheck(torch.ops.dsm.hc_pre.default, (*arguments, 20, 1e-6, 1e-6, 2.0))
    torch.library.opcheck(torch.ops.dsm.hc_pre.default, (arguments[0][:0], *arguments[1:], 1, 0.0, 0.0, 1.0))
    outputs = torch.compile(dsm.ops.hc_pre, fullgraph=True, backend="aot_eager")(*arguments)
    for output, value in zip(outputs, dsm.ops.hc_pre(*arguments), strict=True):
        assert torch.equal(output, value)
    sum(output.sum() for output in outputs).backward()
    assert all(t.grad is not None for t in arguments)
