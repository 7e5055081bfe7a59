# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Merging on CUDA agrees with the CPU's float64, and does not read what has no key."""

from __future__ import annotations

import math

import pytest
import torch
from hostile import CUDA

import ds_flashdmla_moe as dsm
from tolerance import FLOATING, assert_close

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("d_v", [1, 9, 64, 512, 1000])
@pytest.mark.parametrize("parts", [1, 2, 5, 33])
@pytest.mark.parametrize("with_sink", [False, True])
def test_merge_agrees_with_the_cpu(parts: int, d_v: int, dtype: torch.dtype, with_sink: bool) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    outs = torch.randn(parts, 3, 2, 5, d_v).to(dtype)
    lses = 4 * torch.randn(parts, 3, 5, 2, dtype=wide)
    for part, no_key in ((0, math.inf), (parts - 1, -math.inf)):  # these outputs are not read
        outs[part, part % 3, :, part % 5], lses[part, part % 3, part % 5] = math.nan, no_key
    outs[:, 2, 1, 4], lses[:, 2, 4, 1] = math.nan, math.inf
    sink = torch.tensor([0.5, -3.0, math.inf, -math.inf, 100.0], dtype=wide) if with_sink else None
    expected, expected_lse = dsm.ops.merge_attention_states(
        outs.double(), lses.double(), None if sink is None else sink.double()
    )
    on_gpu = [outs.to(CUDA), lses.to(CUDA)]
    far = [on_gpu[0].transpose(1, 3).contiguous().transpose(1, 3), on_gpu[1].mT.contiguous().mT]
    for one in (on_gpu, far):
        out, lse = dsm.ops.merge_attention_states(*one, None if sink is None else sink.to(CUDA))
        assert_close("out", out.cpu(), expected, scale=float(outs.double().nan_to_num().abs().max()))
        assert_close("lse", lse.cpu(), expected_lse, scale=20.0)
        assert not out[2, 1, 4].any()
        assert lse[2, 4, 1] == math.inf
    odd = torch.full((*outs.shape[:-1], d_v + 3), math.nan, dtype=dtype, device=CUDA)[..., 1:-2].copy_(on_gpu[0])
    for one, other in zip(
        dsm.ops.merge_attention_states(odd, on_gpu[1]), dsm.ops.merge_attention_states(*on_gpu), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_merge_keeps_nan_in_its_query() -> None:
    outs, lses = torch.randn(2, 1, 2, 2, 64, device=CUDA), torch.randn(2, 1, 2, 2, device=CUDA)
    clean, _ = dsm.ops.merge_attention_states(outs, lses)
    lses[1, 0, 1, 0] = math.nan
    out, lse = dsm.ops.merge_attention_states(outs, lses)
    assert out[0, 0, 1].isnan().all()
    assert lse.isnan().sum() == 1
    assert torch.equal(out[0, :, 0], clean[0, :, 0])
    assert torch.equal(out[0, 1], clean[0, 1])


def test_merge_of_outputs_without_columns() -> None:
    outs, lses = torch.randn(3, 2, 1, 4, 8, device=CUDA), torch.randn(3, 2, 4, 1, device=CUDA)
    out, lse = dsm.ops.merge_attention_states(outs[..., :0].contiguous(), lses)
    assert out.shape == (2, 1, 4, 0)
    torch.testing.assert_close(lse, lses.logsumexp(0))


def test_merge_does_not_overflow() -> None:
    outs = torch.randn(2, 1, 1, 2, 4, device=CUDA)
    lses = torch.tensor([[3e38, -3e38], [-3e38, -3e38]], device=CUDA)[:, None, :, None]
    out, lse = dsm.ops.merge_attention_states(outs, lses, torch.tensor([-1e30, -3e38], device=CUDA))
    assert torch.equal(out[0, 0, 0], outs[0, 0, 0, 0])
    torch.testing.assert_close(out[0, 0, 1], outs[:, 0, 0, 1].sum(0) / 3)
    assert torch.equal(lse, lses[:1].squeeze(0))
