# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ds_flashdmla_moe as dsm
from threads import assert_same_bits

quant = dsm.quant


def random_mxfp4(*shape: int, lowest: int = 120, spread: int = 0, seed: int = 0) -> quant.MXFP4Tensor:
    """All codes, under scales of which the first and the last of every matrix are `spread` powers of two apart."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(256, (*shape[:-1], shape[-1] // 2), generator=generator, dtype=torch.uint8)
    packed[..., ::16] = 0x91  # 0.5 and -0.5, the hardest codes, in every group
    scales = torch.randint(lowest, lowest + spread + 1, (*shape[:-1], shape[-1] // 32), generator=generator)
    scales[..., 0, 0], scales[..., -1, -1] = lowest + spread, lowest
    return quant.MXFP4Tensor(packed, scales.to(torch.uint8))


def same(one: Tensor, other: Tensor) -> bool:
    """The same bits; NaN is NaN."""
    return torch.equal(one.nan_to_num(0).view(torch.int32), other.nan_to_num(0).view(torch.int32)) and torch.equal(
        one.isnan(), other.isnan()
    )


def test_fp8_golden_bytes() -> None:
    packed = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2] * 2, dtype=torch.uint8)
    q = quant.MXFP4Tensor(packed, torch.tensor([[127], [127 - 14]], dtype=torch.uint8))
    fp8 = quant.mxfp4_to_fp8(q)
    # The largest scale, 1, becomes 2^-6: its codes are those of 0, 32, 64, 96, 128, 192, 256, 384; the codes of the
    # smallest are subnormal: 0 to 12 times 2^-9.
    assert fp8.scales.view(torch.uint8).tolist() == [[121]]
    assert fp8.data.view(torch.uint8)[0, :8].tolist() == [0x00, 0x60, 0x68, 0x6C, 0x70, 0x74, 0x78, 0x7C]
    assert fp8.data.view(torch.uint8)[1, :16].tolist() == [0, 1, 2, 3, 4, 6, 8, 12] + [
        128 + c for c in (0, 1, 2, 3, 4, 6, 8, 12)
    ]


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from([(1, 32), (3, 96), (130, 160), (2, 5, 64)]),
    block=st.sampled_from([(128, 128), (1, 128), (32, 32), (2, 64), (1 << 62, 1 << 62)]),
    lowest=st.integers(0, 240),
    spread=st.integers(0, 14),
)
def test_fp8_is_exact(seed: int, shape: tuple[int, ...], block: tuple[int, int], lowest: int, spread: int) -> None:
    q = random_mxfp4(*shape, lowest=lowest, spread=spread, seed=seed)
    fp8 = quant.mxfp4_to_fp8(q, block)
    assert fp8.block == block
    assert same(fp8.dequantize(), q.dequantize())
    assert torch.equal(fp8.dequantize(torch.float64), q.dequantize(torch.float64))


def test_fp8_refuses_what_it_would_round() -> None:
    q = random_mxfp4(3, 4, 256, spread=0)
    codes = q.scales.view(torch.uint8)
    codes[2, 3, 5] = codes[2, 3, 4] - 15
    with pytest.raises(ValueError, match=r"mxfp4_to_fp8: q must .* 2\*\*14 .* block of 2 x 128 at \[2, 1, 1\]"):
        quant.mxfp4_to_fp8(q, (2, 128))
    assert same(quant.mxfp4_to_fp8(q, (1, 32)).dequantize(), q.dequantize())
    # 2^15 apart is exact after all where only multiples of 1 are used, and any distance where only zeros are.
    q.packed[2, 3, 80:96] = 0x42
    assert same(quant.mxfp4_to_fp8(q, (2, 128)).dequantize(), q.dequantize())
    q.packed[2, 3, 80:96] = 0x80
    for byte in (0, 254):
        codes[2, 3, 5] = byte
        assert same(quant.mxfp4_to_fp8(q, (2, 128)).dequantize(), q.dequantize())


def test_expanded_and_strided_parts() -> None:
    q = random_mxfp4(4, 256, spread=11)
    experts = quant.MXFP4Tensor(q.packed[::2].expand(3, 2, 128), q.scales[::2].expand(3, 2, 8))
    for cast in (quant.mxfp4_to_fp8(experts), quant.mxfp4_to_nvfp4(experts)):
        assert same(cast.dequantize(), experts.dequantize())
        assert same(cast.dequantize()[2], q.dequantize()[::2])


def test_fp8_keeps_nan_groups() -> None:
    q = random_mxfp4(4, 128, spread=11)
    q.scales.view(torch.uint8)[1, 2] = 255
    fp8 = quant.mxfp4_to_fp8(q)
    assert fp8.dequantize()[1, 64:96].isnan().all()
    assert same(fp8.dequantize(), q.dequantize())


def test_fp8_same_bits_for_any_number_of_threads() -> None:
    q = random_mxfp4(300, 256, spread=12)
    args = q.packed[None], q.scales.view(torch.uint8)[None], 128, 128
    assert_same_bits(lambda: [t.view(torch.uint8) for t in torch.ops.dsm.mxfp4_to_fp8(*args)])


def test_fp8_opcheck_and_compile() -> None:
    q = random_mxfp4(2, 3, 64, spread=12)
    args = q.packed, q.scales.view(torch.uint8), 2, 32
    torch.library.opcheck(torch.ops.dsm.mxfp4_to_fp8, args, test_utils=("test_schema", "test_faketensor"))
    run = torch.compile(torch.ops.dsm.mxfp4_to_fp8.default, fullgraph=True, backend="aot_eager")
    for one, other in zip(run(*args), torch.ops.dsm.mxfp4_to_fp8(*args), strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (0, 2, 32), (2, 0, 32)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    q = quant.mxfp4_quantize(torch.empty(shape))
    assert quant.mxfp4_to_fp8(q).shape == shape
    assert quant.mxfp4_to_nvfp4(q).shape == shape


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    shape=st.sampled_from([(1, 32), (3, 96), (2, 5, 64), (2, 1, 3, 32)]),
    lowest=st.integers(0, 237),
    spread=st.integers(0, 17),
)
def test_nvfp4_is_exact(seed: int, shape: tuple[int, ...], lowest: int, spread: int) -> None:
    q = random_mxfp4(*shape, lowest=lowest, spread=spread, seed=seed)
    nvfp4 = quant.mxfp4_to_nvfp4(q)
    assert nvfp4.packed is q.packed
    assert nvfp4.global_scale.shape == shape[:-2]
    assert same(nvfp4.dequantize(), q.dequantize())
    assert torch.equal(nvfp4.dequantize(torch.float64), q.dequantize(torch.float64))


def test_nvfp4_refuses_what_it_would_round() -> None:
    q = random_mxfp4(2, 4, 64, spread=17)
    codes = q.scales.view(torch.uint8)
    codes[1, 2, 1] = 120 + 17 - 18
    with pytest.raises(ValueError, match=r"mxfp4_to_nvfp4: q must .* 2\*\*17 .* group of 32 at \[1, 2, 1\]"):
        quant.mxfp4_to_nvfp4(q)
    q.packed[1, 2, 16:] = 0x80
    for byte in (0, 254):
        codes[1, 2, 1] = byte
        assert same(quant.mxfp4_to_nvfp4(q).dequantize(), q.dequantize())
    codes[1, 2, 1] = 255
    assert same(quant.mxfp4_to_nvfp4(q).dequantize(), q.dequantize())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q: quant.mxfp4_to_fp8(q, (0, 128)), "block_rows must be at least 1, got 0"),
        (lambda q: quant.mxfp4_to_fp8(q, (1, 48)), "block_columns must be a positive multiple of 32, got 48"),
        (lambda q: quant.mxfp4_to_fp8(quant.MXFP4Tensor(q.packed[0], q.scales[0])), r"q must be \[..., N, K\]"),
        (lambda q: quant.mxfp4_to_nvfp4(quant.MXFP4Tensor(q.packed[0], q.scales[0])), r"q must be \[..., N, K\]"),
        (
            lambda q: torch.ops.dsm.mxfp4_to_fp8(q.packed[None], q.scales.view(torch.uint8)[None, :, :1], 1, 32),
            r"group_scales must be \[matrices, rows, columns / 32\]",
        ),
        (
            lambda q: torch.ops.dsm.mxfp4_to_fp8(q.packed[None], q.packed.float(), 1, 32),
            "group_scales must be E8M0 as uint8",
        ),
    ],
)
def test_bad_arguments(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(random_mxfp4(2, 64))
