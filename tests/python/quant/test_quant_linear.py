# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""fp8_linear and fp4_linear against float64, for every format of weights and activations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import ds_flashdmla_moe as dsm
import weight_truth
from ds_flashdmla_moe.quant import FP8Tensor, MXFP4Tensor, NVFP4Tensor, linear
from threads import assert_same_bits
from tolerance import FLOATING, assert_close
from weight_truth import FORMATS

# rows, n, k: few rows and many take different loops; k beyond one panel of 256, and not a multiple of 128
SHAPES = [(1, 3, 32), (5, 70, 96), (40, 300, 320), (3, 257, 544)]


@pytest.mark.parametrize("activation_format", [None, "fp8"])
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_forward_and_backward_match_float64(name: str, dtype: torch.dtype, activation_format: Any) -> None:
    for rows, n, k in SHAPES:
        q = FORMATS[name](n, k)
        x = torch.randn(rows, k).to(dtype).requires_grad_()
        dy = torch.randn(rows, n).to(dtype)
        y = linear(x, q, activation_format)
        (dx,) = torch.autograd.grad(y, x, dy)
        weight = weight_truth.numbers(q)
        taken = weight_truth.fp8(x.detach()) if activation_format else x.detach().double()
        scale = float((taken.abs() @ weight.abs().T).max())  # of the terms: sums of random signs cancel
        assert_close(f"y {rows}x{n}x{k}", y, taken @ weight.T, scale=scale)
        assert_close(f"dx {rows}x{n}x{k}", dx, dy.double() @ weight)  # straight through


@pytest.mark.parametrize("k", [1, 7, 130, 300])
def test_fp8_rows_that_are_no_whole_blocks(k: int) -> None:
    for block in ((128, 128), (1, 128), (3, 1)):
        q = weight_truth._fp8(block)(5, k)
        x = torch.randn(4, k)
        for activation_format, taken in ((None, x.double()), ("fp8", weight_truth.fp8(x))):
            assert_close("y", linear(x, q, activation_format), taken @ weight_truth.numbers(q).T)


def test_blocks_larger_than_the_matrix() -> None:
    q = weight_truth._fp8((5, 40))(5, 40)
    x = torch.randn(3, 40)
    for block in ((128, 128), (2**63 - 1, 2**63 - 1)):
        assert torch.equal(dsm.ops.fp8_linear(x, q.data, q.scales, block), linear(x, q))


def test_golden_values() -> None:
    """By hand: codes of E4M3 (0x38 = 1, 0x40 = 2, 0xb8 = -1, 0x01 = 2^-9, 0x7e = 448) and E2M1."""
    data = torch.tensor([[0x38, 0x40, 0xB8], [0x01, 0x7E, 0x00]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    x = torch.tensor([[1.0, 10.0, 100.0]])
    scales = torch.tensor([[127, 128], [126, 0]], dtype=torch.uint8)  # 1, 2; 1/2, 2^-127
    assert dsm.ops.fp8_linear(x, data, scales, (1, 2)).tolist() == [[1 + 20 - 200.0, (2.0**-9 + 4480) / 2]]
    # Every code once, the low nibble first: 0 .5 1 1.5 2 3 4 6 and their negatives, twice over with scale 2 and 1/4.
    packed = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8)
    values = [0.0, 0.5, 1, 1.5, 2, 3, 4, 6]
    every = torch.eye(32)
    mx = MXFP4Tensor(packed.repeat(1, 2), torch.tensor([[128]], dtype=torch.uint8))
    expected = [2 * v for v in (*values, *(-v for v in values))] * 2
    assert linear(every, mx)[:, 0].tolist() == expected
    nv = NVFP4Tensor(packed.repeat(1, 2), torch.tensor([[2.0, 0.25]]).to(torch.float8_e4m3fn), torch.tensor(0.5))
    assert linear(every, nv)[:, 0].tolist() == [v / 2 for v in expected[:16]] + [v / 16 for v in expected[16:]]


def test_golden_activations() -> None:
    """Rounding to FP8 seen through a weight of ones, one channel at a time."""
    one = FP8Tensor(torch.ones(1, 1).to(torch.float8_e4m3fn), torch.ones(1, 1), (1, 1))
    taken = [
        (448.0, 448.0),  # scale 1
        (449.0, 448.0),  # scale 2: 224.5 -> 224
        (1.0, 1.0),
        (1.0625, 1.0),  # 1/8 steps: the tie goes to the even code
        (1.1875, 1.25),
        (0.0, 0.0),
        (1e-4, math.ldexp(416, -22)),  # the floor's scale 2^-22: 419.43 -> 416
        (1e-9, math.ldexp(2, -31)),  # 0.0042 -> 2 * 2^-9
    ]
    x = torch.tensor([[given] for given, _ in taken])
    assert linear(x, one, "fp8")[:, 0].tolist() == [result for _, result in taken]
    # Each group has its own scale, also the short last one: 1 survives beside 448 but not beside 448 * 2^20.
    x = torch.zeros(1, 130)
    x[0, 0], x[0, 1], x[0, 128], x[0, 129] = 448 * 2.0**20, 1, 448, 1
    ones = FP8Tensor(torch.eye(130).to(torch.float8_e4m3fn), torch.ones(1, 1), (130, 130))
    assert linear(x, ones, "fp8").tolist() == [[448 * 2.0**20, 0, *[0] * 126, 448, 1]]


def test_nan_stays_where_it_belongs() -> None:
    q = weight_truth._fp8((2, 2))(4, 160)
    clean = linear(torch.ones(3, 160), q)
    x = torch.ones(3, 160)
    x[1, 7] = math.nan
    y = linear(x, q, "fp8")
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])
    x[1, 7] = math.inf
    assert linear(x, q, "fp8")[1].isnan().all()
    q.data.view(torch.uint8)[2, 9] = 0xFF
    y = linear(torch.ones(3, 160), q)
    assert y[:, 2].isnan().all()
    assert torch.equal(y[:, [0, 1, 3]], clean[:, [0, 1, 3]])


def test_shapes_and_strides() -> None:
    q = FORMATS["mxfp4"](6, 64)
    x = torch.randn(2, 3, 64)
    y = linear(x, q)
    assert y.shape == (2, 3, 6)
    assert torch.equal(linear(x[1, 2], q), y[1, 2])
    wide = torch.randn(4, 200)
    assert torch.equal(linear(wide[:, 5:69], q), linear(wide[:, 5:69].contiguous(), q))
    assert torch.equal(linear(wide[:, :128:2], q), linear(wide[:, :128:2].contiguous(), q))
    assert linear(x[:0], q).shape == (0, 3, 6)
    nothing = FP8Tensor(torch.zeros(6, 0).to(torch.float8_e4m3fn), torch.zeros(1, 0), (128, 128))
    assert torch.equal(linear(torch.zeros(2, 0), nothing, "fp8"), torch.zeros(2, 6))


@pytest.mark.parametrize("name", ["fp8 5x7 fp32", "mxfp4", "nvfp4 by row"])
def test_gradcheck(name: str) -> None:
    q = FORMATS[name](3, 32)
    x = torch.randn(2, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: linear(v, q), x)


def test_second_derivative_is_refused() -> None:
    x = torch.randn(2, 32, requires_grad=True)
    (dx,) = torch.autograd.grad(linear(x, FORMATS["mxfp4"](3, 32)).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dx.sum().backward()


def test_bad_arguments_are_refused() -> None:
    x, fp8, mx, nv = (
        torch.zeros(2, 64),
        FORMATS["fp8 128x128 e8m0"](5, 64),
        FORMATS["mxfp4"](5, 64),
        FORMATS["nvfp4"](5, 64),
    )
    floats = torch.zeros(1, 1)
    for call, message in [
        (
            lambda: dsm.ops.fp8_linear(x[:, :63], fp8.data, floats),
            r"weight must be \[n, k\] = \[any, 63\] .* got \[5, 64\]",
        ),
        (lambda: dsm.ops.fp8_linear(x.int(), fp8.data, floats), "x must be .* got .* int32"),
        (lambda: dsm.ops.fp8_linear(x, x, floats), "weight must be .* float8_e4m3fn, got .* float32"),
        (lambda: dsm.ops.fp8_linear(x, fp8.data, floats.half()), "weight scales must be float8_e8m0fnu or float32"),
        (lambda: dsm.ops.fp8_linear(x, fp8.data, floats, (4, 128)), r"weight scales must be \[2, 1\]"),
        (
            lambda: dsm.ops.fp8_linear(x, fp8.data, floats, (0, 128)),
            "weight block must be of at least 1 x 1, got 0 x 128",
        ),
        (lambda: dsm.ops.fp8_linear(x, fp8.data, floats, (128, -128)), "weight block must be of at least 1 x 1"),
        (lambda: dsm.ops.fp8_linear(x, fp8.data, floats, (128,)), "block must be rows and columns, got 1 numbers"),
        (lambda: dsm.ops.fp8_linear(x, fp8.data[0], floats), "weight must be of 2 dimensions"),
        (
            lambda: dsm.ops.fp8_linear(x, fp8.data, floats, activation_format="fp4"),
            "activation_format must be none|fp8",
        ),
        (lambda: dsm.ops.fp8_linear(x.sum(), fp8.data, floats), "x must have at least one dimension"),
        (lambda: dsm.ops.fp4_linear(x, fp8.data, fp8.scales), "weight must be .* uint8|int8, got .* float8_e4m3fn"),
        (lambda: dsm.ops.fp4_linear(x, mx.packed, floats), "weight scales must be .* got .* float32"),
        (lambda: dsm.ops.fp4_linear(x, mx.packed, mx.scales[:, :1]), r"weight scales must be \[5, 2\]"),
        (
            lambda: dsm.ops.fp4_linear(x, mx.packed[:, :31], mx.scales),
            r"weight must be .* = \[any, 32\] .* got \[5, 31\]",
        ),
        (
            lambda: dsm.ops.fp4_linear(x[:, :48], mx.packed[:, :24], mx.scales),
            "rows that are whole groups of 32 elements, got 48",
        ),
        (lambda: dsm.ops.fp4_linear(x[:, :63], mx.packed, mx.scales), "with an even last extent for FP4, got 63"),
        (
            lambda: dsm.ops.fp4_linear(x, mx.packed, mx.scales, torch.ones(())),
            "weight global scale must be absent but for NVFP4",
        ),
        (
            lambda: dsm.ops.fp4_linear(x, nv.packed, nv.scales),
            r"weight global scale must be \[\], \[\] or \[5\] float32",
        ),
        (lambda: dsm.ops.fp4_linear(x, nv.packed, nv.scales, torch.ones(4)), "weight global scale must be"),
        (
            lambda: dsm.ops.fp4_linear(x, nv.packed, nv.scales, torch.ones((), dtype=torch.float64)),
            "weight global scale must be",
        ),
        (lambda: linear(x, x), "q must be an FP8Tensor, MXFP4Tensor or NVFP4Tensor, got Tensor"),
    ]:
        with pytest.raises(ValueError, match=message.replace("|", r"\|")):
            call()


def test_same_bits_for_any_number_of_threads() -> None:
    x = torch.randn(300, 320, requires_grad=True)
    for name in ("fp8 32x32 e8m0", "nvfp4"):
        q = FORMATS[name](290, 320)

        def run(q: Any = q) -> list[Tensor]:
            y = linear(x, q, "fp8")
            return [y, *torch.autograd.grad(y.square().sum(), x)]

        assert_same_bits(run)
        # A row's bits do not depend on the rows beside it.
        assert torch.equal(linear(x[7:9], q), linear(x, q)[7:9])


@pytest.mark.parametrize("name", ["fp8 128x128 e8m0", "mxfp4", "nvfp4"])
def test_opcheck_and_compile(name: str) -> None:
    q = FORMATS[name](5, 64)
    x = torch.randn(3, 64, requires_grad=True)
    scales = q.scales if q.scales.dtype != torch.float8_e8m0fnu else q.scales.view(torch.uint8)
    if isinstance(q, FP8Tensor):
        operator, arguments = torch.ops.dsm.fp8_linear.default, (x, q.data, scales, [128, 128], "none")
    else:
        factor = q.global_scale if isinstance(q, NVFP4Tensor) else None
        operator, arguments = torch.ops.dsm.fp4_linear.default, (x, q.packed, scales, factor, "fp8")
    # torch's own test of schemas cannot compare tensors of float8.
    tests = ["test_schema"] if isinstance(q, MXFP4Tensor) else []
    tests += ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(operator, arguments, test_utils=tests)
    compiled = torch.compile(lambda v: linear(v, q), fullgraph=True, backend="aot_eager")
    y = compiled(x)
    assert torch.equal(y, linear(x, q))
    y.sum().backward()
    assert x.grad is not None
