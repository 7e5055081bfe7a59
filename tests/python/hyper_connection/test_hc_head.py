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
SHAPES = [(5, 4, 24), (1, 1, 1), (3, 2, 7), (2, 3, 4, 33), (70, 4, 300), (0, 4, 8)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    hc, hidden = shape[-2:]
    x = torch.randn(shape).mul(3).to(dtype)
    return [t.requires_grad_() for t in (x, *truth.parameters(hc, hidden, hc, 1, dtype))]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward_match_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = inputs(shape, dtype)
    mixed = dsm.ops.hc_head(*arguments)
    dmixed = torch.randn_like(mixed)
    found = torch.autograd.grad(mixed, arguments, dmixed)
    wide = truth.wide(*arguments)
    expected = truth.head(*wide)
    assert mixed.dtype == dtype
    assert_close("mixed", mixed, expected)
    wanted = torch.autograd.grad(expected, wide, dmixed.double())
    for name, value, true in zip(("dx", "dfn", "dbase", "dscale"), found, wanted, strict=True):
        assert_close(name, value, true)


def test_is_the_first_part_of_hc_pre() -> None:
    x, fn, base, scale = (t.detach() for t in inputs((6, 4, 20), torch.bfloat16))
    rest = torch.randn(20, 80)
    whole, _, _ = dsm.ops.hc_pre(x, torch.cat((fn, rest)), torch.cat((base, base.repeat(5))), scale.repeat(3))
    assert torch.equal(dsm.ops.hc_head(x, fn, base, scale), whole)


def test_gradcheck() -> None:
    function = lambda *tensors: dsm.ops.hc_head(*tensors, eps=0.01, norm_eps=0.1)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs((2, 3, 4), torch.float64))


def test_nan_token_stays_alone() -> None:
    x, *parameters = (t.detach() for t in inputs((5, 4, 40), torch.float32))
    clean = dsm.ops.hc_head(x, *parameters)
    x[3, 1, 7] = math.nan
    mixed = dsm.ops.hc_head(x, *parameters)
    assert mixed[3].isnan().all()
    assert torch.equal(mixed[[0, 1, 2, 4]], clean[[0, 1, 2, 4]])


def test_same_bits_for_any_number_of_threads() -> None:
    arguments = inputs((150, 4, 70), torch.float16)

    def run() -> list[Tensor]:
        mixed = dsm.ops.hc_head(*arguments)
        return [mixed, *torch.autograd.grad(mixed.float().square().sum(), arguments)]

    assert_same_bits(run)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(4, 8)}, r"x must be \[..., tokens, hc, hidden\]"),
        ({"fn": torch.zeros(3, 32)}, r"fn must be \[outputs, hc \* hidden\] = \[4, 32\]"),
        ({"base": torch.zeros(4, dtype=torch.float64)}, "base must be .* float32"),
        ({"scale": torch.zeros(3)}, r"scale must be \[scales\] = \[1\]"),
        ({"eps": -1.0}, "eps must be at least 0"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(changed: dict[str, Any], message: str) -> None:
    arguments = {
        "x": torch.zeros(2, 4, 8),
        "fn": torch.zeros(4, 32),
        "base": torch.zeros(4),
        "scale": torch.zeros(1),
    } | changed
    with pytest.raises(ValueError, match=message):
        dsm.ops.hc_head(**arguments)


def test_opcheck_and_compile() -> None:
    arguments = inputs((3, 4, 8), torch.float32)
    torch.library.opcheck(torch.ops.dsm.hc_head.default, (*arguments, 1e-6, 1e-6))
    mixed = torch.compile(dsm.ops.hc_head, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(mixed, dsm.ops.hc_head(*arguments))
    mixed.sum().backward()
    assert all(t.grad is not None for t in arguments)
