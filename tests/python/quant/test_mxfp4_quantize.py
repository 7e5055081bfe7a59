# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_truth import E2M1, half_step, mxfp4
from torch import Tensor

import ds_flashdmla_moe as dsm
from threads import assert_same_bits
from tolerance import FLOATING

quant = dsm.quant
RULES = ("ceil", "ocp")


def parts(q: quant.MXFP4Tensor) -> tuple[Tensor, Tensor]:
    return q.packed, q.scales.view(torch.uint8)


@pytest.mark.parametrize("rule", RULES)
def test_golden_bytes(rule: str) -> None:
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6]
    x = torch.tensor([ties + [-t for t in ties] + [0.0, -0.0] * 8]) * 2.0**-9
    q = quant.mxfp4_quantize(x, rule)
    assert q.scales.view(torch.uint8).tolist() == [[127 - 9]]
    assert q.packed[0].tolist() == [0x20, 0x42, 0x64, 0x76, 0xA8, 0xCA, 0xEC, 0xFE] + [0x80] * 8


def test_only_the_ocp_rule_saturates() -> None:
    x = torch.tensor([[7.0, 4.0] + [0.0] * 30])
    assert quant.mxfp4_quantize(x).dequantize()[0, :2].tolist() == [8, 4]  # scale 2: 3.5 -> 4
    assert quant.mxfp4_quantize(x, "ocp").dequantize()[0, :2].tolist() == [6, 4]


@pytest.mark.parametrize(("rule", "byte"), [("ceil", 1), ("ocp", 0)])
def test_zeros_have_the_smallest_scale(rule: str, byte: int) -> None:
    q = quant.mxfp4_quantize(torch.zeros(2, 32), rule)
    assert q.scales.view(torch.uint8).eq(byte).all()
    assert q.dequantize().eq(0).all()


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(1, 32), (3, 96), (5, 1056), (2, 3, 4, 64), (32,)], ids=str)
def test_bytes_are_those_of_the_definition(shape: tuple[int, ...], rule: str, dtype: torch.dtype) -> None:
    x = (torch.randn(shape) * torch.exp2(8 * torch.randn(*shape[:-1], 1))).clamp(-6e4, 6e4).to(dtype)
    for scale in (1.0, 1e-38, 1e34) if dtype == torch.float32 else (1.0,):
        packed, scales = mxfp4(x * scale, rule)
        q = quant.mxfp4_quantize(x * scale, rule)
        assert torch.equal(q.scales.view(torch.uint8), scales)
        assert torch.equal(q.packed, packed)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_its_block_only(bad: float, rule: str) -> None:
    x = torch.ones(2, 64)
    x[1, 40] = bad
    q = quant.mxfp4_quantize(x, rule)
    assert q.scales.view(torch.uint8).eq(255).tolist() == [[False, False], [False, True]]
    assert q.dequantize().isnan().sum() == 32


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), exponent=st.integers(-100, 100), rule=st.sampled_from(RULES))
def test_properties(seed: int, exponent: int, rule: str) -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    q = quant.mxfp4_quantize(x, rule)
    step = q.scales.double().repeat_interleave(32, -1)
    magnitude = x.double().abs() / step
    error = (q.dequantize(torch.float64) - x.double()).abs() / step
    assert (magnitude <= (6 if rule == "ceil" else 8)).all()
    assert (error <= torch.maximum(half_step(E2M1)(magnitude), magnitude - 6)).all()
    again = quant.mxfp4_quantize(q.dequantize(), rule)
    assert torch.equal(again.dequantize(), q.dequantize())
    assert (quant.mxfp4_quantize(1.5 * x, rule).scales.float() >= q.scales.float()).all()


def test_same_bits_for_any_number_of_threads() -> None:
    x = torch.randn(2, 40, 1024)
    assert_same_bits(lambda: parts(quant.mxfp4_quantize(x)))


def test_strided() -> None:
    for view in (torch.randn(64, 7)[3:35].T[::2], torch.randn(4, 70)[:, 5:37]):
        for one, other in zip(
            parts(quant.mxfp4_quantize(view)), parts(quant.mxfp4_quantize(view.contiguous())), strict=True
        ):
            assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (0, 2, 32), (2, 0, 32)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    assert quant.mxfp4_quantize(torch.empty(shape)).dequantize().shape == shape


def test_opcheck_and_compile() -> None:
    x = torch.randn(2, 3, 32)
    torch.library.opcheck(torch.ops.dsm.mxfp4_quantize, (x, "ocp"), test_utils=("test_schema", "test_faketensor"))
    run = torch.compile(lambda x: parts(quant.mxfp4_quantize(x)), fullgraph=True, backend="aot_eager")
    for one, other in zip(run(x), parts(quant.mxfp4_quantize(x)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: quant.mxfp4_quantize(x[:, :16]), r"mxfp4_quantize: x must be .*multiple of 32, got \[2, 16\]"),
        (lambda x: quant.mxfp4_quantize(x.bool()), "mxfp4_quantize: x must be .*bool"),
        (lambda x: quant.mxfp4_quantize(x, "floor"), r"rule must be ceil\|ocp, got 'floor'"),
        (lambda x: torch.ops.dsm.mxfp4_quantize(x, "ceil"), r"x must be \[matrices, rows, columns\]"),
        (lambda x: torch.ops.dsm.mxfp4_quantize(x[None, :, :8], "ceil"), "x must be of columns in a multiple of 32"),
    ],
)
def test_bad_arguments(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 32))
