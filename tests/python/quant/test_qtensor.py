# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import math

import pytest
import torch

from ds_flashdmla_moe.quant import FP8Tensor, MXFP4Tensor, NVFP4Tensor

VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
# Codes 0 ... 15 in order: the low nibble is the even element.
IN_ORDER = [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]


def u8(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def test_nvfp4_golden_bytes() -> None:
    # 0x38 is 1, 0x7e the largest scale 448, 0x01 the smallest 2^-9.
    packed, scales = u8(*IN_ORDER).expand(2, 3, 8).flatten(1), u8(0x38, 0x7E, 0x01).expand(2, 3)
    q = NVFP4Tensor(packed, scales, torch.tensor(0.75))
    assert q.shape == (2, 48)
    assert q.device.type == "cpu"
    assert q.scales.dtype == torch.float8_e4m3fn
    expected = torch.tensor(VALUES).outer(torch.tensor([1, 448, 2.0**-9])).T.flatten() * 0.75
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert torch.equal(q.dequantize(dtype), expected.to(dtype).expand(2, 48))
    assert math.copysign(1, q.dequantize()[0, 8]) == -1


def test_mxfp4_golden_bytes() -> None:
    packed = u8(*IN_ORDER, *IN_ORDER).expand(4, 16)
    q = MXFP4Tensor(packed.view(torch.int8), u8(127, 0, 254, 255)[:, None])
    assert q.shape == (4, 32)
    assert q.packed.dtype == torch.uint8
    assert q.scales.dtype == torch.float8_e8m0fnu
    wide = q.dequantize(torch.float64)
    assert wide[0].tolist() == VALUES * 2
    assert wide[1].tolist() == [v * 2.0**-127 for v in VALUES] * 2
    assert wide[2].tolist() == [v * 2.0**127 for v in VALUES] * 2
    assert wide[3].isnan().all()
    # The smallest value, 2^-128, is a subnormal float32.
    assert torch.equal(q.dequantize()[:2].double(), wide[:2])


def test_torchs_pair_type_is_viewed() -> None:
    packed = u8(*IN_ORDER)
    q = NVFP4Tensor(packed.view(torch.float4_e2m1fn_x2), u8(0x38), torch.tensor(1.0))
    assert q.packed.dtype == torch.uint8
    assert q.dequantize().tolist() == VALUES


def test_fp8_golden_bytes_and_partial_blocks() -> None:
    data = u8(0x38, 0xB8, 0x7E, 0x01, 0x7F).expand(3, 5)  # 1, -1, 448, 2^-9, NaN
    scales = torch.tensor([[1, 2, 4], [8, 16, 32]], dtype=torch.float32)
    q = FP8Tensor(data, scales, (2, 2))
    expected = [[1, -1, 2 * 448, 2 * 2.0**-9]] * 2 + [[8, -8, 16 * 448, 16 * 2.0**-9]]
    assert q.dequantize()[:, :4].tolist() == expected
    assert q.dequantize()[:, 4].isnan().all()
    powers = FP8Tensor(data, u8(127, 128, 129, 130, 131, 132).view(2, 3), (2, 2))
    assert torch.equal(powers.dequantize()[:, :4], q.dequantize()[:, :4])
    assert FP8Tensor(data[0], torch.ones(1)).dequantize()[:4].tolist() == [1, -1, 448, 2.0**-9]


def test_global_scales_per_expert_and_per_row() -> None:
    packed, scales = u8(0x22).expand(2, 3, 8), u8(0x38).expand(2, 3, 1)
    scalar, experts, rows = torch.tensor(2.0), torch.tensor([2.0, 3.0]), torch.arange(6.0).view(2, 3)
    for factor, expected in ((scalar, 2 * torch.ones(2, 3)), (experts, experts[:, None].expand(2, 3)), (rows, rows)):
        q = NVFP4Tensor(packed, scales, factor)
        assert torch.equal(q.row_scales, expected)
        assert torch.equal(q.dequantize(), expected[..., None].expand(2, 3, 16))
    # A checkpoint's [1] is a scalar.
    assert NVFP4Tensor(packed, scales, torch.tensor([2.0])).global_scale.shape == ()


def test_compressed_tensors_holds_the_reciprocal() -> None:
    packed, scales, stored = u8(0x22).expand(3, 8), u8(0x38).expand(3, 1), torch.tensor([448 * 6 / 0.37])
    q = NVFP4Tensor.from_compressed_tensors(packed, scales, stored)
    assert float(q.global_scale) == float(torch.tensor(1.0) / stored[0])
    with pytest.raises(ValueError, match="weight_global_scale must be a tensor of float32"):
        NVFP4Tensor.from_compressed_tensors(packed, scales, stored.double())


def test_gate_and_up_of_different_global_scales_join_exactly() -> None:
    codes = torch.randint(256, (2, 2, 4, 16), dtype=torch.uint8)
    scales = torch.randint(1, 127, (2, 2, 4, 2), dtype=torch.uint8)
    factors = torch.rand(2, 2)
    gate, up = (NVFP4Tensor(c, s, f) for c, s, f in zip(codes, scales, factors, strict=True))
    joined = NVFP4Tensor.cat([gate, up])
    assert joined.global_scale.shape == (2, 8)
    assert torch.equal(joined.dequantize(), torch.cat([gate.dequantize(), up.dequantize()], -2))
    assert torch.equal(NVFP4Tensor.cat([gate, gate]).global_scale, gate.global_scale)
    with pytest.raises(ValueError, match="parts must hold at least one"):
        NVFP4Tensor.cat([])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MXFP4Tensor(u8(*range(15)), u8(1)), r"packed must be \[..., K / 2\] with K a multiple of 32"),
        (lambda: MXFP4Tensor(u8(*range(16)), u8(1, 2)), r"scales must be \[..., K / 32\] = \[1\], got \[2\]"),
        (lambda: MXFP4Tensor(torch.ones(16), u8(1)), "packed must be a tensor of uint8 or int8 .*got float32"),
        (lambda: MXFP4Tensor(u8(*range(16)), None), "scales must be a tensor of .* got NoneType"),
        (lambda: MXFP4Tensor(u8(1)[0], u8(1)), "packed must be"),
        (lambda: NVFP4Tensor(u8(*range(8)), u8(1), 1.0), "global_scale must be a tensor of float32, got float"),
        (lambda: NVFP4Tensor(u8(*range(8)), u8(1), torch.ones(3)), r"global_scale must be a scalar.* got \[3\]"),
        (lambda: NVFP4Tensor(u8(*range(8)), u8(1), torch.ones((), device="meta")), "one device, got cpu, cpu, meta"),
        (lambda: FP8Tensor(u8(1, 2), u8(1, 2)), r"scales must be \[..., ceil\(N / 1\), ceil\(K / 128\)\] = \[1\]"),
        (lambda: FP8Tensor(u8(1, 2), u8(1), (0, 1)), r"block must be two numbers of at least 1, got \(0, 1\)"),
        (lambda: FP8Tensor(u8(1, 2), u8(1), (2, 2)), r"data must be \[..., N, K\], got \[2\]"),
    ],
)
def test_bad_parts_are_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_moves_and_empty() -> None:
    q = FP8Tensor(u8(1, 2), u8(1))
    moved = q.to("meta")
    assert moved.device.type == "meta"
    assert moved.scales.device.type == "meta"
    assert moved.block == q.block
    for empty in (
        NVFP4Tensor(u8().view(0, 8), u8().view(0, 1), torch.tensor(1.0)),
        MXFP4Tensor(u8().view(2, 0), u8().view(2, 0)),
        FP8Tensor(u8().view(0, 3), u8().view(0, 2), (2, 2)),
    ):
        assert empty.dequantize(torch.bfloat16).shape == empty.shape
