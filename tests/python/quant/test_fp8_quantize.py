# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_truth import E4M3, fp8, half_step
from torch import Tensor

import ds_flashdmla_moe as dsm
from threads import assert_same_bits
from tolerance import FLOATING

quant = dsm.quant
FORMATS = ("ue8m0", "fp32")


def bits(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float32 else tensor.view(torch.uint8)


def hexes(tensor: Tensor) -> list[str]:
    return [f"{byte:02x}" for byte in bits(tensor).flatten().tolist()]


def test_golden_bytes_ue8m0() -> None:
    # amax 1: 1/448 rounds up to 2^-8, byte 119; the codes are those of 256, -128, 76.8 -> 80 and 0.
    q = quant.fp8_quantize(torch.tensor([[1, -0.5, 0.3, 0]]), 4)
    assert hexes(q.scales) == [f"{119:02x}"]
    assert hexes(q.data) == ["78", "f0", "6a", "00"]
    # 448 · 2^k is the last amax of its scale.
    x = torch.tensor([[448.0], [448.0 + 2.0**-15]])
    assert quant.fp8_quantize(x).scales.float().tolist() == [[1], [2]]


def test_golden_bytes_fp32() -> None:
    # Scale 1; 17 is a tie between 16 and 18, 0.3 lies next to 0.3125, 2^-10 is a tie between 0 and 2^-9.
    q = quant.fp8_quantize(torch.tensor([[448, -17, 0.3, 2.0**-10]]), scale_format="fp32")
    assert q.scales.tolist() == [[1.0]]
    assert hexes(q.data) == ["7e", "d8", "2a", "00"]


def test_zero_groups_have_the_floor_of_the_scale() -> None:
    assert hexes(quant.fp8_quantize(torch.zeros(1, 128)).scales) == [f"{105:02x}"]  # 2^-22
    floor = quant.fp8_quantize(torch.tensor([[0.0, -0.0]]), scale_format="fp32")
    assert floor.scales.tolist() == [[float(torch.tensor(1e-4) / 448)]]
    assert hexes(floor.data) == ["00", "80"]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize(
    ("shape", "block"),
    [((3, 128), (1, 128)), ((2, 300), (1, 128)), ((1, 1), (1, 7)), ((5, 7), (2, 3)), ((33, 70), (32, 32)),
     ((130, 129), (128, 128)), ((2, 1100), (1, 1100)), ((3, 600), (2, 1 << 62))],
    ids=str,
)  # fmt: skip
def test_bytes_are_those_of_the_definition(
    shape: tuple[int, int], block: tuple[int, int], scale_format: str, dtype: torch.dtype
) -> None:
    x = (torch.randn(shape) * torch.exp2(torch.randn(shape) * 4)).clamp(-6e4, 6e4).to(dtype)
    q = quant.fp8_block_quantize(x, block, scale_format)
    codes, scales = fp8(x, block, scale_format)
    assert torch.equal(bits(q.data), codes)
    assert torch.equal(bits(q.scales), scales)
    assert q.block == block
    assert q.shape == shape


@pytest.mark.parametrize("scale_format", FORMATS)
def test_leading_dimensions_and_strides(scale_format: str) -> None:
    x = torch.randn(2, 3, 5, 40)
    q = quant.fp8_quantize(x, 16, scale_format)
    assert q.data.shape == x.shape
    assert q.scales.shape == (2, 3, 5, 3)
    w = quant.fp8_block_quantize(x, (2, 16), scale_format)
    assert w.scales.shape == (2, 3, 3, 3)
    for i in range(2):
        one = quant.fp8_quantize(x[i, 1], 16, scale_format)
        assert torch.equal(bits(q.data[i, 1]), bits(one.data))
        assert torch.equal(bits(w.scales[i, 1]), bits(quant.fp8_block_quantize(x[i, 1], (2, 16), scale_format).scales))
    view = torch.randn(40, 7)[3:35].T[::2]
    for part in (view, torch.randn(4, 70)[:, 5:37]):
        strided, plain = (quant.fp8_quantize(t, 8, scale_format) for t in (part, part.contiguous()))
        assert torch.equal(bits(strided.data), bits(plain.data))
        assert torch.equal(bits(strided.scales), bits(plain.scales))
    assert quant.fp8_quantize(torch.ones(5), 2, scale_format).dequantize().tolist() == [1] * 5


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_its_block_only(bad: float, scale_format: str) -> None:
    x = torch.ones(2, 8)
    x[1, 5] = bad
    q = quant.fp8_quantize(x, 4, scale_format)
    assert q.scales.float().isnan().tolist() == [[False, False], [False, True]]
    assert hexes(q.data[1, 4:]) == ["7f"] * 4
    assert torch.equal(q.dequantize().isnan(), q.scales.float().isnan().repeat_interleave(4, -1))
    # Finite in float64 only.
    assert quant.fp8_quantize(torch.tensor([[1e39]], dtype=torch.float64)).dequantize().isnan().all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    exponent=st.integers(-12, 100),
    columns=st.integers(1, 40),
    group=st.integers(1, 50),
    scale_format=st.sampled_from(FORMATS),
)
def test_properties(seed: int, exponent: int, columns: int, group: int, scale_format: str) -> None:
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    q = quant.fp8_quantize(x, group, scale_format)
    value, scale = q.dequantize(torch.float64), q.scales.double().repeat_interleave(group, -1)[:, :columns]
    # Nothing saturates, and the error is at most half of the gap between codes; x / scale is rounded, too.
    assert ((value - x.double()).abs() <= scale * half_step(E4M3)(x.double().abs() / scale) * (1 + 2.0**-20)).all()
    again = quant.fp8_quantize(q.dequantize(), group, scale_format)
    if scale_format == "fp32":
        assert torch.equal(bits(again.data), bits(q.data))
    else:
        assert torch.equal(again.dequantize(), q.dequantize())
    assert (quant.fp8_quantize(3 * x, group, scale_format).scales.float() >= q.scales.float()).all()


def test_same_bits_for_any_number_of_threads() -> None:
    x = torch.randn(70, 1024)
    assert_same_bits(lambda: [bits(t) for q in (quant.fp8_quantize(x), quant.fp8_block_quantize(x, (32, 32)))
                              for t in (q.data, q.scales)])  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 2, 8), (2, 0, 8)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    assert quant.fp8_quantize(torch.empty(shape)).dequantize().shape == shape
    assert quant.fp8_block_quantize(torch.empty(shape)).dequantize().shape == shape


@pytest.mark.parametrize("scale_format", FORMATS)
def test_opcheck_and_compile(scale_format: str) -> None:
    x = torch.randn(2, 3, 20)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.dsm.fp8_quantize, (x, 2, 16, scale_format), test_utils=tests)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        q = quant.fp8_quantize(x, 16, scale_format)
        return bits(q.data), q.dequantize()

    for one, other in zip(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: quant.fp8_quantize(x.int()), "fp8_quantize: x must be .* got .*int32"),
        (lambda x: quant.fp8_quantize(x[0, 0]), r"fp8_quantize: x must be \[..., K\].* got \[\]"),
        (lambda x: quant.fp8_quantize(x, 0), "block_columns must be at least 1, got 0"),
        (lambda x: quant.fp8_quantize(x, -(2**63)), "block_columns must be at least 1"),
        (lambda x: quant.fp8_quantize(x, scale_format="e8m0"), r"scale_format must be ue8m0\|fp32, got 'e8m0'"),
        (lambda x: quant.fp8_block_quantize(x[0]), r"fp8_block_quantize: w must be \[..., N, K\]"),
        (lambda x: quant.fp8_block_quantize(x, (0, 1)), "block_rows must be at least 1, got 0"),
        (lambda x: torch.ops.dsm.fp8_quantize(x, 1, 1, "fp32"), r"x must be \[matrices, rows, columns\]"),
    ],
)
def test_bad_arguments(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 2))
