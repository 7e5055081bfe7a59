# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import math
from typing import Any

import hyper_connection_truth as truth
import pytest
import torch
from torch import Tensor

import ds_flashdmla_moe as dsm
from threads import assert_same_bits
from tolerance import FLOATING, assert_close

# x's shape: [..., hc, hidden].
SHAPES = [(5, 4, 24), (1, 1, 1), (3, 2, 7), (2, 3, 4, 33), (70, 4, 300), (4, 5, 16), (0, 4, 8)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    lead, (hc, hidden) = shape[:-2], shape[-2:]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    y, x = torch.randn(*lead, hidden).to(dtype), torch.randn(shape).to(dtype)
    post, comb = torch.randn(*lead, hc, dtype=wide), torch.randn(*lead, hc, hc, dtype=wide)
    return [t.requires_grad_() for t in (y, x, post, comb)]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward_match_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = inputs(shape, dtype)
    dout = torch.randn(shape).to(dtype)
    out = dsm.ops.hc_post(*arguments)
    found = torch.autograd.grad(out, arguments, dout)
    wide = truth.wide(*arguments)
    expected = truth.post(*wide)
    assert out.dtype == dtype
    assert_close("out", out, expected)
    wanted = torch.autograd.grad(expected, wide, dout.double())
    for name, value, true in zip(("dy", "dx", "dpost", "dcomb"), found, wanted, strict=True):
        assert_close(name, value, true)


def test_rows_of_comb_are_sources() -> None:
    x = torch.tensor([[[1.0], [10.0]]])
    comb = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    out = dsm.ops.hc_post(torch.tensor([[100.0]]), x, torch.tensor([[0.0, 1.0]]), comb)
    assert out.flatten().tolist() == [1 * 1 + 3 * 10, 100 + 2 * 1 + 4 * 10]


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(dsm.ops.hc_post, inputs((2, 3, 4), torch.float64))


def test_writes_back_what_hc_pre_read() -> None:
    """A whole step: gradients flow through the three operators and a sub-layer into every parameter."""
    dtype = torch.float64
    x = torch.randn(3, 4, 8, dtype=dtype, requires_grad=True)
    pre, head = truth.parameters(4, 8, 24, 3, dtype), truth.parameters(4, 8, 4, 1, dtype)
    leaves = [x, *(p.requires_grad_() for p in (*pre, *head))]

    def step(*tensors: Tensor) -> Tensor:
        x, *parameters = tensors
        mixed, post, comb = dsm.ops.hc_pre(x, *parameters[:3])
        return dsm.ops.hc_head(dsm.ops.hc_post(torch.tanh(mixed), x, post, comb), *parameters[3:])

    assert torch.autograd.gradcheck(step, leaves)


def test_nan_stays_in_its_token_and_column() -> None:
    y, x, post, comb = (t.detach() for t in inputs((4, 3, 8), torch.float32))
    clean = dsm.ops.hc_post(y, x, post, comb)
    x[1, 2, 5] = math.nan
    out = dsm.ops.hc_post(y, x, post, comb)
    assert out[1, :, 5].isnan().all()
    out[1, :, 5] = clean[1, :, 5]
    assert torch.equal(out, clean)


def test_strided_views() -> None:
    y, x = torch.randn(6, 20)[:, 3:11], torch.randn(4, 6, 12).transpose(0, 1)[..., 1:9]
    post, comb = torch.randn(4, 6).T, torch.randn(6, 4, 4).mT
    dense = [t.contiguous() for t in (y, x, post, comb)]
    assert torch.equal(dsm.ops.hc_post(y, x, post, comb), dsm.ops.hc_post(*dense))


def test_same_bits_for_any_number_of_threads() -> None:
    arguments = inputs((150, 4, 70), torch.bfloat16)

    def run() -> list[Tensor]:
        out = dsm.ops.hc_post(*arguments)
        return [out, *torch.autograd.grad(out.float().square().sum(), arguments)]

    assert_same_bits(run)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(4, 8)}, r"x must be \[..., tokens, hc, hidden\]"),
        ({"y": torch.zeros(3, 8)}, r"y must begin with \[2\]"),
        ({"y": torch.zeros(2, 7)}, r"y must be \[tokens, hidden\] = \[2, 8\]"),
        ({"y": torch.zeros(2, 8, dtype=torch.float16)}, "y must be .* float32"),
        ({"post": torch.zeros(2, 3)}, r"post must be \[tokens, hc\] = \[2, 4\]"),
        ({"comb": torch.zeros(2, 16)}, r"comb must begin with \[2\]"),
        ({"comb": torch.zeros(2, 4, 3)}, r"comb must be \[tokens, hc, hc\] = \[2, 4, 4\]"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(changed: dict[str, Any], message: str) -> None:
    arguments = {
        "y": torch.zeros(2, 8),
        "x": torch.zeros(2, 4, 8),
        "post": torch.zeros(2, 4),
        "comb": torch.zeros(2, 4, 4),
    } | changed
    with pytest.raises(ValueError, match=message):
        dsm.ops.hc_post(**arguments)


def test_opcheck_and_compile() -> None:
    arguments = inputs((3, 4, 8), torch.float32)
    torch.library.opcheck(torch.ops.dsm.hc_post.default, tuple(arguments))
    torch.library.opcheck(torch.ops.dsm.hc_post.default, tuple(t[:0] for t in arguments))
    out = torch.compile(dsm.ops.hc_post, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(out, dsm.ops.hc_post(*arguments))
    out.sum().backward()
    assert all(t.grad is not None for t in arguments)
