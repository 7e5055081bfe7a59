# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import ds_flashdmla_moe as dsm
from threads import assert_same_bits
from tolerance import FLOATING, assert_close

# Rows per expert; the last number is rows behind the last expert's.
COUNTS = [
    (3, 0, 5, 1, 2),
    (0, 0, 40, 0, 0),  # one expert takes everything
    (0, 0, 0, 7),  # nobody takes anything
    (191, 193, 0, 1, 3),  # about one tile of rows
    (0,),  # no experts
    (0, 0),
]
SIZES = [(1, 1), (7, 5), (64, 257), (300, 33)]  # (n, k)


def offsets_of(counts: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(counts[:-1])], dtype=torch.int32)


def truth(a: Tensor, b: Tensor, offsets: Tensor, transpose_b: bool) -> Tensor:
    n = b.shape[1 if transpose_b else 2]
    c = [a[:0].sum() * b[:0].sum() + a.new_zeros(0, n)]  # a function of both, even without experts
    for e, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        c.append(a[begin:end] @ (b[e].T if transpose_b else b[e]))
    return torch.cat([*c, a.new_zeros(a.shape[0] - int(offsets[-1]), n)])


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("transpose_b", [True, False])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_forward_and_backward_match_float64(
    n: int, k: int, counts: tuple[int, ...], transpose_b: bool, dtype: torch.dtype
) -> None:
    rows, experts, offsets = sum(counts), len(counts) - 1, offsets_of(counts)
    a = torch.randn(rows, k).to(dtype)
    a[int(offsets[-1]) :] = float("nan")  # never read
    b = torch.randn((experts, n, k) if transpose_b else (experts, k, n)).to(dtype)
    dc = torch.randn(rows, n).to(dtype)
    dc[int(offsets[-1]) :] = float("nan")
    a.requires_grad_()
    b.requires_grad_()

    c = dsm.ops.grouped_gemm(a, b, offsets, transpose_b)
    da, db = torch.autograd.grad(c, (a, b), dc)

    wide_a = a.detach().double().requires_grad_()
    wide_b = b.detach().double().requires_grad_()
    expected = truth(wide_a, wide_b, offsets, transpose_b)
    expected_da, expected_db = torch.autograd.grad(expected, (wide_a, wide_b), dc.double())
    assert_close("c", c, expected)
    assert_close("da", da, expected_da)
    assert_close("db", db, expected_db)


@pytest.mark.parametrize("transpose_b", [True, False])
def test_gradcheck(transpose_b: bool) -> None:
    a = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn((3, 2, 3) if transpose_b else (3, 3, 2), dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, 4, 4, 7], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda u, v: dsm.ops.grouped_gemm(u, v, offsets, transpose_b), (a, b))


def test_only_wanted_gradients_are_computed() -> None:
    a, b = torch.randn(4, 3, requires_grad=True), torch.randn(2, 5, 3, requires_grad=True)
    offsets = torch.tensor([0, 1, 4], dtype=torch.int32)
    both = torch.autograd.grad(dsm.ops.grouped_gemm(a, b, offsets).sum(), (a, b))
    assert torch.equal(torch.autograd.grad(dsm.ops.grouped_gemm(a, b.detach(), offsets).sum(), a)[0], both[0])
    assert torch.equal(torch.autograd.grad(dsm.ops.grouped_gemm(a.detach(), b, offsets).sum(), b)[0], both[1])


def test_strided_rows() -> None:
    part, b = torch.randn(6, 40)[:, 3:24], torch.randn(2, 5, 21)
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    assert torch.equal(dsm.ops.grouped_gemm(part, b, offsets), dsm.ops.grouped_gemm(part.contiguous(), b, offsets))


@pytest.mark.parametrize("offsets", [[0, 3, 2], [1, 2, 3], [0, 2, 6], [0, -1, 2], [0, 2**31 - 1, 2**31 - 1]])
def test_offsets_that_do_not_cut_the_rows_are_refused(offsets: list[int]) -> None:
    a, b, bad = torch.zeros(5, 3), torch.zeros(2, 4, 3), torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises(ValueError, match="expert_offsets must be from 0, not decreasing and at most rows = 5"):
        dsm.ops.grouped_gemm(a, b, bad)


def test_bad_arguments_are_refused() -> None:
    a, b, offsets = torch.zeros(5, 3), torch.zeros(2, 4, 3), torch.tensor([0, 1, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"b must be \[experts, n, k\] = \[any, any, 3\] float32"):
        dsm.ops.grouped_gemm(a, b.transpose(1, 2), offsets)
    with pytest.raises(ValueError, match=r"b must be .* float32, got .* float64"):
        dsm.ops.grouped_gemm(a, b.double(), offsets)
    with pytest.raises(ValueError, match=r"expert_offsets must be .* int32, got .* int64"):
        dsm.ops.grouped_gemm(a, b, offsets.long())
    with pytest.raises(ValueError, match=r"expert_offsets must be \[experts \+ 1\] = \[3\]"):
        dsm.ops.grouped_gemm(a, b, offsets[:2])
    with pytest.raises(ValueError, match="a must be of 2 dimensions"):
        dsm.ops.grouped_gemm(a[0], b, offsets)


def test_same_bits_for_any_number_of_threads() -> None:
    a, b = torch.randn(700, 65, requires_grad=True), torch.randn(3, 290, 65, requires_grad=True)
    offsets = torch.tensor([0, 300, 301, 650], dtype=torch.int32)

    def run() -> list[Tensor]:
        c = dsm.ops.grouped_gemm(a, b, offsets)
        return [c, *torch.autograd.grad(c.square().sum(), (a, b))]

    assert_same_bits(run)


def test_opcheck_and_compile() -> None:
    a, b = torch.randn(5, 3, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)
    offsets = torch.tensor([0, 1, 4], dtype=torch.int32)
    torch.library.opcheck(torch.ops.dsm.grouped_gemm.default, (a, b, offsets, True))
    torch.library.opcheck(torch.ops.dsm.grouped_gemm.default, (a[:, :3], b.detach(), offsets, True))
    compiled = torch.compile(dsm.ops.grouped_gemm, fullgraph=True, backend="aot_eager")
    c = compiled(a, b, offsets)
    assert torch.equal(c, dsm.ops.grouped_gemm(a, b, offsets))
    c.sum().backward()
    assert a.grad is not None
    assert b.grad is not None
