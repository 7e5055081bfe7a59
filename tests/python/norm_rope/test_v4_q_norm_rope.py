# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from rope_truth import rotated
from torch import Tensor

import ds_flashdmla_moe as dsm
from threads import assert_same_bits
from tolerance import FLOATING, assert_close

# q's shape and the number of rotated dimensions.
SHAPES = [
    ((5, 2, 8), 8),
    ((3, 4, 24), 16),
    ((1, 1, 7), 2),
    ((2, 6, 3, 64), 16),
    ((70, 3, 80), 64),
    ((2, 1, 5), 0),
    ((0, 2, 8), 4),
    ((4, 0, 8), 4),
]


def truth(q: Tensor, positions: Tensor, inv_freq: Tensor, eps: float = 1e-6) -> Tensor:
    return rotated(q / torch.sqrt((q * q).mean(-1, keepdim=True) + eps), positions, inv_freq)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize(("shape", "d_rope"), SHAPES, ids=str)
def test_forward_and_backward_match_float64(shape: tuple[int, ...], d_rope: int, dtype: torch.dtype) -> None:
    q = torch.randn(shape).mul(3).to(dtype).requires_grad_()
    positions, inv_freq = torch.randint(0, 1_000_000, shape[:-2]), dsm.ops.rope_frequencies(d_rope)
    dy = torch.randn(shape).to(dtype)
    y = dsm.ops.v4_q_norm_rope(q, positions, inv_freq)
    (dq,) = torch.autograd.grad(y, q, dy)
    wide = q.detach().double().requires_grad_()
    expected = truth(wide, positions, inv_freq)
    (expected_dq,) = torch.autograd.grad(expected, wide, dy.double())
    assert y.dtype == dtype
    assert_close("y", y, expected)
    # dq is a difference of two terms of about this size.
    terms = dy.double() * torch.rsqrt(wide.detach().square().mean(-1, keepdim=True))
    assert_close("dq", dq, expected_dq, scale=float(terms.abs().max()) if terms.numel() else 0.0)


def test_reference_code_differs_by_its_roundings() -> None:
    """DeepSeek's own chain rounds to bfloat16 at every step of the norm."""
    q = torch.randn(64, 8, 512).mul(5).bfloat16()
    positions, inv_freq = torch.arange(64) * 777, dsm.ops.rope_frequencies(64, 160000, factor=16, original_length=65536)
    normal = q * torch.rsqrt(q.square().mean(-1, keepdim=True) + 1e-6)
    assert normal.dtype == torch.bfloat16
    chain = rotated(normal, positions, inv_freq).bfloat16()
    y = dsm.ops.v4_q_norm_rope(q, positions, inv_freq)
    # A unit of the last place of the pair's length: rotation moves roundings of one element to the other.
    kept, part = truth(q.double(), positions, inv_freq).split([448, 64], dim=-1)
    lengths = part.unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, dim=-1)
    ulp = torch.exp2(torch.cat((kept.abs(), lengths), -1).log2().floor() - 7)
    worst = float(((y.double() - chain.double()).abs() / ulp).max())
    print(f"reference chain: {worst:.2f} bfloat16 ulp")
    assert 0 < worst < 4


def test_gradcheck() -> None:
    q = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    positions, inv_freq = torch.tensor([0, 3, 700]), dsm.ops.rope_frequencies(4)
    assert torch.autograd.gradcheck(lambda t: dsm.ops.v4_q_norm_rope(t, positions, inv_freq, 0.1), q)


def test_positions_broadcast_and_tokens_do_not_depend_on_their_company() -> None:
    q, positions, inv_freq = torch.randn(2, 5, 3, 16), torch.arange(5), dsm.ops.rope_frequencies(8)
    y = dsm.ops.v4_q_norm_rope(q, positions, inv_freq)
    for batch in range(2):
        for t in range(5):
            assert torch.equal(
                y[batch, t], dsm.ops.v4_q_norm_rope(q[batch, t : t + 1], positions[t : t + 1], inv_freq)[0]
            )


def test_nan_head_stays_alone() -> None:
    q, positions, inv_freq = torch.randn(4, 3, 16), torch.arange(4), dsm.ops.rope_frequencies(8)
    clean = dsm.ops.v4_q_norm_rope(q, positions, inv_freq)
    q[2, 1, 0] = math.nan
    y = dsm.ops.v4_q_norm_rope(q, positions, inv_freq)
    assert y[2, 1].isnan().all()
    y[2, 1] = clean[2, 1]
    assert torch.equal(y, clean)


def test_extreme_positions_and_strided_heads() -> None:
    q = torch.randn(3, 5, 24).transpose(0, 1)[..., 4:20]
    positions = torch.tensor([0, -1, 2**31 - 1, -(2**31), 2**62])
    inv_freq = dsm.ops.rope_frequencies(8)
    y = dsm.ops.v4_q_norm_rope(q, positions, inv_freq)
    assert torch.equal(y, dsm.ops.v4_q_norm_rope(q.contiguous(), positions, inv_freq))
    assert_close("y", y, truth(q.double(), positions, inv_freq))


def test_same_bits_for_any_number_of_threads() -> None:
    q, positions = torch.randn(200, 4, 40).bfloat16().requires_grad_(), torch.arange(200)
    inv_freq = dsm.ops.rope_frequencies(16)

    def run() -> list[Tensor]:
        y = dsm.ops.v4_q_norm_rope(q, positions, inv_freq)
        return [y, *torch.autograd.grad(y.float().square().sum() + y.float().sum(), q)]

    assert_same_bits(run)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.zeros(2, 4)}, r"q must be \[..., tokens, heads, d\]"),
        ({"q": torch.zeros(3, 2, 8, dtype=torch.int32)}, "q must be .* got .* int32"),
        ({"positions": torch.zeros(4, dtype=torch.int64)}, "positions must broadcast"),
        ({"positions": torch.zeros(3)}, "positions must be .* int64"),
        ({"inv_freq": torch.zeros(5)}, "inv_freq must be at most d / 2 = 4 long, got 5"),
        ({"eps": -1.0}, "eps must be at least 0"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(changed: dict[str, Any], message: str) -> None:
    arguments = {"q": torch.zeros(3, 2, 8), "positions": torch.arange(3), "inv_freq": torch.zeros(4)} | changed
    with pytest.raises(ValueError, match=message):
        dsm.ops.v4_q_norm_rope(**arguments)


def test_opcheck_and_compile() -> None:
    q = torch.randn(3, 2, 8, requires_grad=True)
    positions, inv_freq = torch.arange(3), dsm.ops.rope_frequencies(4)
    torch.library.opcheck(torch.ops.dsm.v4_q_norm_rope.default, (q, positions, inv_freq, 1e-6))
    torch.library.opcheck(torch.ops.dsm.v4_q_norm_rope.default, (q[:0], positions[:0], inv_freq, 0.0))
    y = torch.compile(dsm.ops.v4_q_norm_rope, fullgraph=True, backend="aot_eager")(q, positions, inv_freq)
    assert torch.equal(y, dsm.ops.v4_q_norm_rope(q, positions, inv_freq))
    y.sum().backward()
    assert q.grad is not None
