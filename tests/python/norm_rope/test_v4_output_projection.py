# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from rope_truth import rotated, rounded
from torch import Tensor

import ds_flashdmla_moe as dsm
from threads import assert_same_bits
from tolerance import FLOATING, assert_close

# o's shape, the number of rotated dimensions, groups and rank.
SHAPES = [
    ((5, 4, 8), 8, 2, 3),
    ((3, 6, 24), 16, 3, 5),
    ((1, 1, 7), 2, 1, 1),
    ((2, 60, 2, 16), 4, 2, 33),
    ((100, 2, 20), 16, 1, 1030),
    ((2, 3, 5), 0, 3, 4),
    ((0, 2, 8), 4, 2, 3),
    ((4, 0, 8), 4, 2, 3),
    ((4, 2, 8), 4, 2, 0),
]


def truth(o: Tensor, positions: Tensor, inv_freq: Tensor, wo_a: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """A group at a time; float64, but the rotated heads rounded to the dtype, whose gradient passes as through 1."""
    turned = rotated(o, positions, inv_freq, inverse=True)
    turned = turned + (rounded(o.detach(), positions, inv_freq, dtype, inverse=True) - turned.detach())
    heads, rank = o.shape[-2] // groups, wo_a.shape[0] // groups
    parts = [
        turned[..., g * heads : (g + 1) * heads, :].flatten(-2) @ wo_a[g * rank : (g + 1) * rank].mT
        for g in range(groups)
    ]
    return torch.cat(parts, -1)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize(("shape", "d_rope", "groups", "rank"), SHAPES, ids=str)
def test_forward_and_backward_match_float64(
    shape: tuple[int, ...], d_rope: int, groups: int, rank: int, dtype: torch.dtype
) -> None:
    o = torch.randn(shape).to(dtype).requires_grad_()
    wo_a = torch.randn(groups * rank, shape[-2] // groups * shape[-1]).to(dtype).requires_grad_()
    positions, inv_freq = torch.randint(0, 1_000_000, shape[:-2]), dsm.ops.rope_frequencies(d_rope)
    dz = torch.randn(*shape[:-2], groups * rank).to(dtype)
    z = dsm.ops.v4_output_projection(o, positions, inv_freq, wo_a, groups)
    found = torch.autograd.grad(z, (o, wo_a), dz)
    wide = [t.detach().double().requires_grad_() for t in (o, wo_a)]
    expected = truth(wide[0], positions, inv_freq, wide[1], groups, dtype)
    wanted = torch.autograd.grad(expected, wide, dz.double())
    assert z.dtype == dtype
    assert_close("z", z, expected)
    for name, value, true in zip(("do", "dwo_a"), found, wanted, strict=True):
        assert_close(name, value, true)


def test_undoes_the_rotation_of_values_at_the_querys_position() -> None:
    """A query that attends to itself alone gets its own unrotated value."""
    v = torch.randn(6, 4, 16, dtype=torch.float64)
    positions, inv_freq = torch.arange(6) * 999, dsm.ops.rope_frequencies(8)
    o = dsm.ops.rope(v, positions, inv_freq)
    wo_a = torch.randn(10, 32, dtype=torch.float64)
    z = dsm.ops.v4_output_projection(o, positions, inv_freq, wo_a, 2)
    assert_close("z", z, torch.cat((v[:, :2].flatten(1) @ wo_a[:5].T, v[:, 2:].flatten(1) @ wo_a[5:].T), -1))


def test_gradcheck_and_single_gradients() -> None:
    o = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    wo_a = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    positions, inv_freq = torch.tensor([0, 3, 700]), dsm.ops.rope_frequencies(4)

    def function(o: Tensor, wo_a: Tensor) -> Tensor:
        return dsm.ops.v4_output_projection(o, positions, inv_freq, wo_a, 2)

    assert torch.autograd.gradcheck(function, (o, wo_a))
    both = torch.autograd.grad(function(o, wo_a).sum(), (o, wo_a))
    assert torch.equal(torch.autograd.grad(function(o, wo_a.detach()).sum(), o)[0], both[0])
    assert torch.equal(torch.autograd.grad(function(o.detach(), wo_a).sum(), wo_a)[0], both[1])


def test_nan_stays_in_its_token_and_group() -> None:
    o, wo_a = torch.randn(5, 4, 8), torch.randn(6, 16)
    positions, inv_freq = torch.arange(5), dsm.ops.rope_frequencies(4)
    clean = dsm.ops.v4_output_projection(o, positions, inv_freq, wo_a, 2)
    o[3, 2, 0] = math.nan
    z = dsm.ops.v4_output_projection(o, positions, inv_freq, wo_a, 2)
    assert z[3, 3:].isnan().all()
    z[3, 3:] = clean[3, 3:]
    assert torch.equal(z, clean)


def test_strided_heads_and_single_tokens() -> None:
    o, wo_a = torch.randn(4, 5, 24).transpose(0, 1)[..., 4:20], torch.randn(6, 32)
    positions, inv_freq = torch.tensor([0, -1, 2**31 - 1, -(2**31), 2**62]), dsm.ops.rope_frequencies(8)
    z = dsm.ops.v4_output_projection(o, positions, inv_freq, wo_a, 2)
    assert torch.equal(z, dsm.ops.v4_output_projection(o.contiguous(), positions, inv_freq, wo_a, 2))
    for t in range(5):
        one = dsm.ops.v4_output_projection(o[t : t + 1], positions[t : t + 1], inv_freq, wo_a, 2)
        assert torch.equal(one[0], z[t])


def test_same_bits_for_any_number_of_threads() -> None:
    o, wo_a = torch.randn(250, 4, 16).bfloat16().requires_grad_(), torch.randn(20, 32).bfloat16().requires_grad_()
    positions, inv_freq = torch.arange(250), dsm.ops.rope_frequencies(8)

    def run() -> list[Tensor]:
        z = dsm.ops.v4_output_projection(o, positions, inv_freq, wo_a, 2)
        return [z, *torch.autograd.grad(z.float().square().sum(), (o, wo_a))]

    assert_same_bits(run)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"o": torch.zeros(2, 4)}, r"o must be \[..., tokens, heads, d\]"),
        ({"o": torch.zeros(3, 4, 8, dtype=torch.int32)}, "o must be .* got .* int32"),
        ({"positions": torch.zeros(4, dtype=torch.int64)}, "positions must broadcast"),
        ({"inv_freq": torch.zeros(5)}, "inv_freq must be at most d / 2 = 4 long, got 5"),
        ({"wo_a": torch.zeros(6)}, r"wo_a must be \[groups \* rank, heads / groups \* d\]"),
        ({"wo_a": torch.zeros(6, 15)}, r"wo_a must be .* = \[any, 16\]"),
        ({"wo_a": torch.zeros(5, 16)}, "wo_a must be of a multiple of groups = 2 rows, got 5"),
        ({"wo_a": torch.zeros(6, 16, dtype=torch.bfloat16)}, "wo_a must be .* float32"),
        ({"groups": 3}, "groups must be a divisor of heads = 4, got 3"),
        ({"groups": 0}, "groups must be a divisor"),
        ({"groups": -2}, "groups must be a divisor"),
        ({"groups": -(2**63)}, "groups must be a divisor"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(changed: dict[str, Any], message: str) -> None:
    arguments = {
        "o": torch.zeros(3, 4, 8),
        "positions": torch.arange(3),
        "inv_freq": torch.zeros(4),
        "wo_a": torch.zeros(6, 16),
        "groups": 2,
    } | changed
    with pytest.raises(ValueError, match=message):
        dsm.ops.v4_output_projection(**arguments)


def test_opcheck_and_compile() -> None:
    o, wo_a = torch.randn(3, 4, 8, requires_grad=True), torch.randn(6, 16, requires_grad=True)
    positions, inv_freq = torch.arange(3), dsm.ops.rope_frequencies(4)
    operator = torch.ops.dsm.v4_output_projection.default
    torch.library.opcheck(operator, (o, positions, inv_freq, wo_a, 2))
    torch.library.opcheck(operator, (o[:0].detach(), positions[:0], inv_freq, wo_a, 2))
    z = torch.compile(dsm.ops.v4_output_projection, fullgraph=True, backend="aot_eager")(
        o, positions, inv_freq, wo_a, 2
    )
    assert torch.equal(z, dsm.ops.v4_output_projection(o, positions, inv_freq, wo_a, 2))
    z.sum().backward()
    assert o.grad is not None
    assert wo_a.grad is not None
