# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_truth import E2M1, E4M3, e4m3, half_step, nvfp4, packed_e2m1
from torch import Tensor

import ds_flashdmla_moe as dsm
from threads import assert_same_bits
from tolerance import FLOATING

quant = dsm.quant


def parts(q: quant.NVFP4Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.packed, q.scales.view(torch.uint8), q.global_scale


def test_golden_bytes() -> None:
    # The largest block has scale 448 and global scale 1: ties go to the even code, 7 and more saturate.
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6]
    x = torch.tensor([[448 * t for t in ties] + [-448 * t for t in ties], [0.0] * 7 + [-0.0] * 7 + [1, -12 / 7]])
    q = quant.nvfp4_quantize(x)
    assert q.global_scale.item() == 1
    assert q.packed[0].tolist() == [0x20, 0x42, 0x64, 0x76, 0xA8, 0xCA, 0xEC, 0xFE]
    # amax / 6 = 2/7 = 0.2857 rounds to 0.28125 = 1.125 · 2^-2; 1 / 0.28125 = 3.56 -> 4, -6.1 -> -6; -0 becomes 0.
    assert q.scales.view(torch.uint8).flatten().tolist() == [0x7E, 0x29]
    assert q.packed[1].tolist() == [0] * 7 + [0xF6]
    # 7 times a given scale saturates; a tiny block keeps the smallest scale, 2^-9.
    x = torch.tensor([[7 * 448.0] * 16, [1e-6] * 16])
    q = quant.nvfp4_quantize(x, torch.tensor(1.0))
    assert q.scales.view(torch.uint8).flatten().tolist() == [0x7E, 0x01]
    assert q.dequantize()[:, 0].tolist() == [6 * 448, 0]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (5, 1040), (2, 3, 4, 32)], ids=str)
def test_bytes_are_those_of_model_optimizer(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    # Magnitudes over many powers of two, so that all scales occur; 16-bit products then hit ties and saturation.
    x = (torch.randn(shape) * torch.exp2(3 * torch.randn(*shape[:-1], 1))).to(dtype)
    x[..., 0, :16] = 0
    x.view(-1)[-1] = 7
    q = quant.nvfp4_quantize(x)
    assert q.global_scale.shape == shape[:-2]
    flat = x.view(-1, *shape[-2:])
    for i in range(len(flat)):
        packed, scales, factor = nvfp4(flat[i])
        assert q.global_scale.view(-1)[i] == factor
        assert torch.equal(q.scales.view(torch.uint8).view(-1, *scales.shape)[i], scales)
        assert torch.equal(q.packed.view(-1, *packed.shape)[i], packed)


def test_given_global_scale() -> None:
    x = torch.randn(3, 4, 32, dtype=torch.bfloat16)
    own = quant.nvfp4_quantize(x)
    for one, other in zip(parts(quant.nvfp4_quantize(x, own.global_scale)), parts(own), strict=True):
        assert torch.equal(one, other)
    one_for_all = quant.nvfp4_quantize(x, torch.tensor([0.01]))
    assert one_for_all.global_scale.shape == ()
    for i in range(3):
        packed, scales, _ = nvfp4(x[i], 0.01)
        assert torch.equal(one_for_all.packed[i], packed)
        assert torch.equal(one_for_all.scales[i].view(torch.uint8), scales)


@pytest.mark.parametrize("factor", [None, 0.0, 1.0])
def test_zeros(factor: float | None) -> None:
    q = quant.nvfp4_quantize(torch.tensor([0.0, -0.0]).repeat(2, 8), None if factor is None else torch.tensor(factor))
    assert q.packed.eq(0).all()
    assert q.scales.float().eq(1).all()
    assert q.global_scale.item() == (factor or 0)
    assert q.dequantize().eq(0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows(bad: float) -> None:
    x = torch.ones(2, 2, 32)
    x[1, 0, 3] = bad
    q = quant.nvfp4_quantize(x)
    assert q.dequantize().isnan().flatten(1).all(1).tolist() == [False, True]
    assert not q.dequantize()[0].isnan().any()
    q = quant.nvfp4_quantize(x, torch.tensor(0.1))
    assert q.dequantize().isnan().sum() == 16
    assert q.dequantize()[1, 0, :16].isnan().all()


def test_four_over_six_reads_like_any_other() -> None:
    # Blocks map their amax to 6 or to 4, whichever errs less, and 256 takes the place of 448.
    x = torch.randn(4, 64).numpy().reshape(4, 4, 16)
    g, amax = np.abs(x).max() / np.float32(6 * 256), np.abs(x).max(-1, keepdims=True)
    best, error = None, None
    for target in (6, 4):
        scale = e4m3(amax / (target * g))
        step = (E4M3[scale] * g).astype(np.float32)
        packed = packed_e2m1((x / step).reshape(4, 64)).reshape(4, 4, 8)
        q = quant.NVFP4Tensor(
            torch.from_numpy(packed).flatten(1), torch.from_numpy(scale[..., 0]), torch.tensor(g)
        ).dequantize(torch.float64)
        squares = ((q.numpy().reshape(x.shape) - x) ** 2).sum(-1, keepdims=True)
        if best is None:
            best, error = (packed, scale), squares
        else:
            best = tuple(np.where(squares < error, new, old) for new, old in zip((packed, scale), best, strict=True))
            least = np.minimum(squares, error)
    assert (squares < error).any()
    assert (squares > error).any()
    q = quant.NVFP4Tensor(torch.from_numpy(best[0]).flatten(1), torch.from_numpy(best[1][..., 0]), torch.tensor(g))
    total = ((q.dequantize(torch.float64).numpy() - x.reshape(4, 64)) ** 2).sum()
    assert total == pytest.approx(least.sum(), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), exponent=st.integers(-60, 60), blocks=st.integers(1, 4), spread=st.integers(0, 6))
def test_properties(seed: int, exponent: int, blocks: int, spread: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, blocks, 16, generator=generator) * 2.0**exponent
    x = (x * torch.exp2(-spread * torch.rand(3, blocks, 1, generator=generator))).flatten(1)
    q = quant.nvfp4_quantize(x)
    step = q.scales.double().repeat_interleave(16, -1) * q.global_scale.double()
    magnitude = x.double().abs() / step
    # Half of the gap between codes; what a scale that was rounded down saturates lies within that, too.
    error = (q.dequantize(torch.float64) - x.double()).abs() / step
    assert (error <= half_step(E2M1)(magnitude) * (1 + 2.0**-20)).all()
    again = quant.nvfp4_quantize(q.dequantize())
    # As values, because a code of -0 becomes one of 0.
    assert torch.equal(quant.NVFP4Tensor(again.packed, q.scales, q.global_scale).dequantize(), q.dequantize())
    assert torch.equal(again.scales.float(), q.scales.float())
    wider = quant.nvfp4_quantize(1.5 * x, q.global_scale)
    assert (wider.scales.float() >= q.scales.float()).all()


def test_same_bits_for_any_number_of_threads() -> None:
    x = torch.randn(2, 40, 1024)
    assert_same_bits(lambda: parts(quant.nvfp4_quantize(x)))


def test_strides_and_one_row() -> None:
    for view in (torch.randn(64, 7)[3:35].T[::2], torch.randn(4, 70)[:, 5:37]):
        for one, other in zip(
            parts(quant.nvfp4_quantize(view)), parts(quant.nvfp4_quantize(view.contiguous())), strict=True
        ):
            assert torch.equal(one, other)
    row = torch.randn(32)
    assert torch.equal(quant.nvfp4_quantize(row).packed, quant.nvfp4_quantize(row[None]).packed[0])


@pytest.mark.parametrize("shape", [(0, 16), (3, 0), (0, 2, 16), (2, 0, 16)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    q = quant.nvfp4_quantize(torch.empty(shape))
    assert q.dequantize().shape == shape
    assert q.global_scale.eq(0).all()


def test_opcheck_and_compile() -> None:
    x = torch.randn(2, 3, 32)
    for given_scale in (None, torch.ones(2)):
        torch.library.opcheck(
            torch.ops.dsm.nvfp4_quantize, (x, given_scale), test_utils=("test_schema", "test_faketensor")
        )
    run = torch.compile(lambda x: parts(quant.nvfp4_quantize(x)), fullgraph=True, backend="aot_eager")
    for one, other in zip(run(x), parts(quant.nvfp4_quantize(x)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: quant.nvfp4_quantize(x[:, :15]), r"nvfp4_quantize: x must be .*multiple of 16, got \[2, 15\]"),
        (lambda x: quant.nvfp4_quantize(x.long()), "nvfp4_quantize: x must be .*int64"),
        (lambda x: quant.nvfp4_quantize(x, torch.ones(2)), r"global_scale must be .* got \[2\] float32"),
        (lambda x: quant.nvfp4_quantize(x, torch.tensor(1)), r"global_scale must be .* got \[\] int64"),
        (lambda x: torch.ops.dsm.nvfp4_quantize(x, None), r"x must be \[matrices, rows, columns\]"),
        (lambda x: torch.ops.dsm.nvfp4_quantize(x[None, :, :8], None), "x must be of columns in a multiple of 16"),
        (lambda x: torch.ops.dsm.nvfp4_quantize(x[None], torch.ones(3)), r"given must be \[matrices\] = \[1\]"),
    ],
)
def test_bad_arguments(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 16))
