# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

import ds_flashdmla_moe as dsm
from tolerance import FLOATING


def offsets(lengths: list[int], first: int = 0) -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=first)), dtype=torch.int32)


def draw(total_q: int, total_kv: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(total_q, 4, 24), torch.randn(total_kv, 2, 24), torch.randn(total_kv, 2, 16)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def parts(cu_seqlens: Tensor, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The rows of each sequence, as batches of one."""
    return [tuple(t[a:b][None] for t in tensors) for a, b in pairwise(cu_seqlens.tolist())]


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("q_lengths", "kv_lengths"),
    [([5, 0, 1, 130, 1, 40], [5, 3, 0, 130, 70, 20]), ([7], [9]), ([], []), ([0, 0], [0, 4])],
    ids=["mixed", "one", "none", "empty"],
)
def test_equals_each_sequence_alone(
    q_lengths: list[int], kv_lengths: list[int], causal: bool, dtype: torch.dtype
) -> None:
    cu_q, cu_kv = offsets(q_lengths), offsets(kv_lengths)
    q, k, v = (t.requires_grad_() for t in draw(sum(q_lengths), sum(kv_lengths), dtype))
    out, lse = dsm.flash_attn_varlen_func(q, k, v, cu_q, cu_kv, 130, 130, causal=causal)
    assert lse.shape == (q.shape[0], 4)
    assert lse.transpose(0, 1).is_contiguous()
    dout, dlse = torch.randn(out.shape).to(dtype), torch.randn(lse.shape).to(lse.dtype)
    gradients = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    for (qs, outs, lses, douts, dlses, dqs), (ks, vs, dks, dvs) in zip(
        parts(cu_q, q.detach(), out, lse, dout, dlse, gradients[0]),
        parts(cu_kv, k.detach(), v.detach(), *gradients[1:]),
        strict=True,
    ):
        inputs = [t.clone().requires_grad_() for t in (qs, ks, vs)]
        one, one_lse = dsm.ops.flash_attn(*inputs, causal=causal)
        assert torch.equal(one, outs)
        assert torch.equal(one_lse, lses.transpose(1, 2))
        expected = torch.autograd.grad((one, one_lse), inputs, (douts, dlses.transpose(1, 2)))
        for a, b in zip((dqs, dks, dvs), expected, strict=True):
            assert torch.equal(a, b)


def test_rows_outside_every_sequence() -> None:
    """They give 0, lse -inf and gradient 0, and their NaN goes nowhere."""
    cu_q, cu_kv = offsets([4, 70], first=2), offsets([9, 80], first=3)
    q, k, v = draw(80, 100, torch.float32)
    inside_q, inside_kv = slice(2, 76), slice(3, 92)
    expected = dsm.flash_attn_varlen_func(
        q[inside_q], k[inside_kv], v[inside_kv], cu_q - 2, cu_kv - 3, 70, 80, causal=True
    )
    for t, inside in ((q, inside_q), (k, inside_kv), (v, inside_kv)):
        outside = torch.ones(t.shape[0], dtype=torch.bool)
        outside[inside] = False
        t[outside] = float("nan")
        t.requires_grad_()
    out, lse = dsm.flash_attn_varlen_func(q, k, v, cu_q, cu_kv, 70, 80, causal=True)
    assert torch.equal(out[inside_q], expected[0])
    assert torch.equal(lse[inside_q], expected[1])
    for rows in (slice(0, 2), slice(76, 80)):
        assert (out[rows] == 0).all()
        assert (lse[rows] == -torch.inf).all()
    dq, dk, dv = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(t.isfinite().all() for t in (dq, dk, dv))
    assert not dq[:2].any()
    assert not dk[92:].any()
    assert not dv[:3].any()


def test_packed_forms() -> None:
    cu = offsets([3, 8])
    qkv = torch.randn(11, 2, 8 + 8 + 6)
    q, k, v = qkv[..., :8], qkv[..., 8:16], qkv[..., 16:]
    expected = dsm.flash_attn_varlen_func(q, k, v, cu, cu, 8, 8, causal=True)
    one = dsm.flash_attn_varlen_qkvpacked_func(qkv, cu, 8, 8, causal=True)
    other = dsm.flash_mla.flash_attn_varlen_kvpacked_func(q, qkv[..., 8:], cu, cu, 8, 8, 8, causal=True)
    for a, b, c in zip(expected, one, other, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize(
    ("cu_q", "cu_kv", "message"),
    [
        ([0, 5, 3], [0, 2, 4], "cu_seqlens_q must be not decreasing, got 5 before 3"),
        ([-1, 5], [0, 5], "cu_seqlens_q must be at least 0, got -1"),
        ([0, 5], [0, 7], "cu_seqlens_kv must be at most the number of rows, 6, got 7"),
        ([0, 5], [0, 3, 5], r"cu_seqlens_kv must be \[batch \+ 1\] = \[2\]"),
        ([], [], r"cu_seqlens_q must be \[batch \+ 1\]"),
    ],
)
def test_bad_offsets_are_refused(cu_q: list[int], cu_kv: list[int], message: str) -> None:
    q, k, v = draw(6, 6, torch.float32)
    with pytest.raises(ValueError, match=message):
        dsm.flash_attn_varlen_func(
            q, k, v, torch.tensor(cu_q, dtype=torch.int32), torch.tensor(cu_kv, dtype=torch.int32), 5, 5
        )


def test_other_bad_arguments_are_refused() -> None:
    q, k, v = draw(6, 6, torch.float32)
    cu = offsets([6])
    with pytest.raises(ValueError, match="dropout_p must be 0"):
        dsm.flash_attn_varlen_func(q, k, v, cu, cu, 6, 6, dropout_p=0.1)
    with pytest.raises(ValueError, match=r"cu_seqlens_q must be .* int32, got .* int64"):
        dsm.flash_attn_varlen_func(q, k, v, cu.long(), cu, 6, 6)
    with pytest.raises(ValueError, match="q must be"):
        dsm.flash_attn_varlen_func(q[None], k, v, cu, cu, 6, 6)
    with pytest.raises(ValueError, match="cu_seqlens_kv must be given exactly when"):
        torch.ops.dsm.flash_attn(q, k, v, cu, None, 1.0, False)
    with pytest.raises(ValueError, match=r"qkv must be \[T, heads, 2·head_dim_qk \+ d_v\]"):
        dsm.flash_attn_varlen_qkvpacked_func(q, cu, 6, 13)
    with pytest.raises(ValueError, match=r"kv must be \[T, heads, head_dim_qk \+ d_v\]"):
        dsm.flash_attn_varlen_kvpacked_func(q, k, cu, cu, 6, 6, 0)


def test_compile_fullgraph() -> None:
    q, k, v = (t.requires_grad_() for t in draw(6, 6, torch.float32))
    cu = offsets([2, 4])

    def f(q: Tensor) -> Tensor:
        out, lse = dsm.flash_attn_varlen_func(q, k, v, cu, cu, 4, 4, causal=True)
        return out.sum() + lse.sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    (a,), (b,) = torch.autograd.grad(compiled(q), q), torch.autograd.grad(f(q), q)
    assert torch.equal(a, b)
