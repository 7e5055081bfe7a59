# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ds_flashdmla_moe as dsm
from threads import assert_same_bits
from tolerance import FLOATING, assert_close

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def hadamard(d: int) -> Tensor:
    """Sylvester's matrix by its closed form, (-1)^popcount(i & j)."""
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(d)] for i in range(d)]
    return torch.tensor(signs, dtype=torch.float64)


def nearest_e2m1(x: Tensor) -> Tensor:
    """By search over the codes; a tie goes to the even one."""
    distance = (x.abs()[..., None] - E2M1).abs()
    best = distance.amin(-1, keepdim=True)
    odd = torch.arange(8) % 2
    code = torch.where(distance == best, odd, 2).argmin(-1)
    return E2M1[code].copysign(x)


def power_of_two_above(amax: Tensor, largest_code: int) -> Tensor:
    """Of amax / largest_code, which the definition takes as a product in float32."""
    mantissa, exponent = torch.frexp(amax.float() * torch.tensor(1 / largest_code))
    return torch.exp2((exponent - (mantissa == 0.5).int()).double())


def fp4_truth(x: Tensor) -> Tensor:
    blocks = x.double().unflatten(-1, (-1, 32))
    scale = power_of_two_above(blocks.abs().amax(-1, keepdim=True).clamp_min(6 * 2.0**-126), 6)
    return (nearest_e2m1(blocks / scale) * scale).flatten(-2)


def fp8_truth(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = power_of_two_above(x.double().abs().amax(-1).clamp_min(float(torch.tensor(1e-4))), 448)
    return (x.double() / scale[..., None]).to(torch.float8_e4m3fn), scale.float()


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", [(3, 1), (3, 2), (2, 3, 64), (5, 128), (130, 256), (0, 8), (16,)], ids=str)
def test_rotation_matches_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).mul(3).to(dtype).requires_grad_()
    dy = torch.randn(shape).to(dtype)
    matrix = hadamard(shape[-1]) * shape[-1] ** -0.5
    y = dsm.ops.hadamard_quantize(x)
    y.backward(dy)
    assert y.dtype == dtype
    assert_close("y", y, x.detach().double() @ matrix)
    assert_close("dx", x.grad, dy.double() @ matrix)


def test_golden_row() -> None:
    # The rows of H for d = 4: ++++, +-+-, ++--, +--+.
    y = dsm.ops.hadamard_quantize(torch.tensor([1.0, 2.0, 4.0, 8.0]))
    assert y.tolist() == [7.5, -2.5, -4.5, 1.5]


def test_rotation_is_its_own_inverse_and_cancels_in_products() -> None:
    q, k = torch.randn(2, 9, 128, dtype=torch.float64)
    turned_q, turned_k = dsm.ops.hadamard_quantize(q), dsm.ops.hadamard_quantize(k)
    assert_close("inverse", dsm.ops.hadamard_quantize(turned_q), q)
    assert_close("products", (turned_q * turned_k).sum(-1), (q * k).sum(-1), scale=128.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp4_golden_values(dtype: torch.dtype) -> None:
    # amax = 6 gives scale 1: all ties, each to its even code.
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -5.0, 0.26, 4.9, 5.1, 0.0, -0.0]
    x = torch.tensor(ties * 2, dtype=dtype)
    expected = [0, 1, 1, 2, 2, 4, 4, 6, -0.0, -1, -4, 0.5, 4, 6, 0, -0.0]
    y = dsm.ops.hadamard_quantize(x, "fp4", rotate=False)
    assert y.tolist() == expected * 2
    assert y.signbit().tolist() == [value < 0 or str(value) == "-0.0" for value in expected * 2]
    # The next larger amax doubles the scale; every block has its own; a block of zeros stays zero.
    x = torch.zeros(3, 32, dtype=dtype)
    x[0, :2] = torch.tensor([6.03125, 1.0])
    x[1, :2] = torch.tensor([6.0, 1.0])
    y = dsm.ops.hadamard_quantize(x.view(1, 96), "fp4", rotate=False).view(3, 32)
    assert y[:, :2].tolist() == [[6, 1], [6, 1], [0, 0]]
    x[0, 1] = 0.4
    y = dsm.ops.hadamard_quantize(x.view(1, 96), "fp4", rotate=False).view(3, 32)
    assert y[0, 1] == 0  # a quarter of the doubled scale is below 0.25 · 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_golden_bytes(dtype: torch.dtype) -> None:
    x = torch.tensor([[448.0, 1.0, -0.5, 17.0], [450.0, 1.0, 2.0**-8, 0.0], [0.0] * 4], dtype=dtype)
    x[1, 0] = 450.0
    values, scale = dsm.ops.hadamard_quantize(x, "fp8", rotate=False)
    assert scale.tolist() == [1.0, 2.0, 2.0**-22]
    assert values.view(torch.uint8).tolist() == [
        [0x7E, 0x38, 0xB0, 0x58],  # 17 is a tie between 16 and 18, to the even code
        [0x76, 0x30, 0x01, 0x00],  # 225 to 224; 2^-9 is the smallest subnormal number
        [0x00] * 4,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_quantised_is_the_rounded_rotation(dtype: torch.dtype) -> None:
    x = torch.randn(50, 128).mul(torch.logspace(-6, 6, 50)[:, None]).to(dtype)
    rotated = dsm.ops.hadamard_quantize(x)
    fp4 = dsm.ops.hadamard_quantize(x, "fp4")
    assert fp4.dtype == dtype
    assert torch.equal(fp4.double(), fp4_truth(rotated))
    values, scale = dsm.ops.hadamard_quantize(x, "fp8")
    truth, truth_scale = fp8_truth(rotated)
    assert torch.equal(scale, truth_scale)
    assert torch.equal(values.view(torch.uint8), truth.view(torch.uint8))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, min_value=-(2.0**100), max_value=2.0**100), min_size=32, max_size=32)
)
def test_any_block_matches_the_formula(block: list[float]) -> None:
    x = torch.tensor(block).view(1, 32)
    assert torch.equal(dsm.ops.hadamard_quantize(x, "fp4", rotate=False).double(), fp4_truth(x))
    values, scale = dsm.ops.hadamard_quantize(x, "fp8", rotate=False)
    truth, truth_scale = fp8_truth(x)
    assert torch.equal(scale, truth_scale)
    assert torch.equal(values.view(torch.uint8), truth.view(torch.uint8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_makes_its_block_nan_and_stays_alone(bad: float) -> None:
    x = torch.randn(4, 64)
    clean = dsm.ops.hadamard_quantize(x, "fp4", rotate=False)
    clean_values, clean_scale = dsm.ops.hadamard_quantize(x, "fp8")
    x[2, 40] = bad
    y = dsm.ops.hadamard_quantize(x, "fp4", rotate=False)
    assert y[2, 32:].isnan().all()
    assert torch.equal(y[2, :32], clean[2, :32])
    values, scale = dsm.ops.hadamard_quantize(x, "fp8")
    assert scale[2].isnan()
    assert values[2].float().isnan().all()
    others = [0, 1, 3]
    assert torch.equal(y[others], clean[others])
    assert torch.equal(scale[others], clean_scale[others])
    assert torch.equal(values.view(torch.uint8)[others], clean_values.view(torch.uint8)[others])


def test_gradients() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dsm.ops.hadamard_quantize, (x,))
    assert torch.autograd.gradgradcheck(dsm.ops.hadamard_quantize, (x,))
    row = torch.randn(2, 32, requires_grad=True)
    assert not dsm.ops.hadamard_quantize(row, "fp4").requires_grad
    assert not any(t.requires_grad for t in dsm.ops.hadamard_quantize(row, "fp8"))


def test_strided_rows_and_threads() -> None:
    wide = torch.randn(700, 80)
    part = wide[:, 3:67]
    assert torch.equal(dsm.ops.hadamard_quantize(part, "fp4"), dsm.ops.hadamard_quantize(part.contiguous(), "fp4"))
    turned = torch.randn(64, 9).T
    assert torch.equal(dsm.ops.hadamard_quantize(turned), dsm.ops.hadamard_quantize(turned.contiguous()))
    assert_same_bits(lambda: [dsm.ops.hadamard_quantize(part), dsm.ops.hadamard_quantize(part, "fp8")[1]])


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(2, 24), {}, "d must be a power of two to be rotated, got 24"),
        (torch.zeros(2, 16), {"format": "fp4"}, "d must be a multiple of 32 in the format fp4, got 16"),
        (torch.zeros(2, 32), {"format": "int8"}, r"format must be none\|fp4\|fp8, got 'int8'"),
        (torch.zeros(2, 32).half(), {"format": "fp4"}, r"x must be .* float32\|bfloat16, got .* float16"),
        (torch.zeros(2, 32).double(), {"format": "fp8"}, "x must be .* got .* float64"),
        (torch.zeros(2, 32).int(), {}, "x must be .* got .* int32"),
        (torch.tensor(1.0), {}, "at least one dimension"),
    ],
)
def test_bad_arguments_are_refused(x: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dsm.ops.hadamard_quantize(x, **options)


@pytest.mark.parametrize("format", ["none", "fp4", "fp8"])
def test_opcheck_and_compile(format: str) -> None:
    x = torch.randn(3, 32, requires_grad=True)
    torch.library.opcheck(torch.ops.dsm.hadamard_quantize.default, (x, format, True))
    compiled = torch.compile(dsm.ops.hadamard_quantize, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        torch.utils._pytree.tree_leaves(compiled(x, format)),
        torch.utils._pytree.tree_leaves(dsm.ops.hadamard_quantize(x, format)),
        strict=True,
    ):
        assert torch.equal(one.float(), other.float())
