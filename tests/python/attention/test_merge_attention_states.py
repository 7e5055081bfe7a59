# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from mla_truth import attend_all
from torch import Tensor

import ds_flashdmla_moe as dsm
from threads import assert_same_bits
from tolerance import FLOATING, assert_close

NO_KEY = (math.inf, -math.inf)


def states(parts: int, batch: int, s_q: int, h_q: int, d_v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.randn(parts, batch, s_q, h_q, d_v).to(dtype), 4 * torch.randn(parts, batch, h_q, s_q, dtype=wide)


def truth(outs: Tensor, lses: Tensor, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    outs, lses = outs.double(), lses.double()
    lses = torch.where(lses.isinf(), -math.inf, lses)
    lse = lses.logsumexp(0)
    weights = torch.where(lses.isinf(), 0.0, (lses - lse).exp())
    if sink is not None:
        weights = weights * torch.where(lse == -math.inf, 0.0, torch.sigmoid(lse - sink.double()[:, None]))
    weights = weights.transpose(-1, -2)[..., None]
    out = torch.where(weights == 0, 0.0, weights * outs).sum(0)
    return out, torch.where(lse == -math.inf, math.inf, lse)


def check(outs: Tensor, lses: Tensor, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    out, lse = dsm.ops.merge_attention_states(outs, lses, sink)
    expected, expected_lse = truth(outs, lses, sink)
    assert out.dtype == outs.dtype
    assert lse.dtype == lses.dtype
    # The sums may cancel, and e^lse is what has a small relative error: that of lse is absolute.
    assert_close("out", out, expected, scale=float(outs.double().nan_to_num().abs().max()))
    assert_close("lse", lse, expected_lse, scale=max(1.0, float(lses.nan_to_num(0, 0, 0).abs().max())))
    return out, lse


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_matches_float64(parts: int, dtype: torch.dtype) -> None:
    outs, lses = states(parts, 2, 3, 4, 9, dtype)
    check(outs, lses)
    check(outs, lses, torch.tensor([0.5, -3.0, math.inf, -math.inf], dtype=lses.dtype))


def test_parts_of_the_keys_give_the_whole() -> None:
    q, keys, sink = torch.randn(2, 3, 2, 8) * 2, torch.randn(50, 8), torch.tensor([1.0, 3.0])
    ranges = [(0, 7), (7, 30), (30, 50)]
    parts = [attend_all(q, lambda *_, r=r: keys[slice(*r)], 5, 0.4) for r in ranges]
    out, lse = dsm.ops.merge_attention_states([out for out, _ in parts], [lse for _, lse in parts], sink.double())
    expected, expected_lse = attend_all(q, lambda *_: keys, 5, 0.4, sink)
    assert_close("out", out, expected)
    assert_close("lse", lse, expected_lse)


def test_golden_sink() -> None:
    """Scores (1, 2) and sink 0.5 weigh 0.2312239 and 0.6285317."""
    outs, lses = torch.eye(2)[:, None, None, None], torch.tensor([1.0, 2.0])[:, None, None, None]
    out, lse = dsm.ops.merge_attention_states(outs, lses, torch.tensor([0.5]))
    torch.testing.assert_close(out.flatten(), torch.tensor([0.2312239, 0.6285317]), rtol=0, atol=1e-7)
    torch.testing.assert_close(lse.item(), math.log(math.e + math.e**2), rtol=1e-7, atol=0)


@pytest.mark.parametrize("sink", [None, -math.inf, 0.0, math.inf])
@pytest.mark.parametrize("no_key", NO_KEY)
def test_parts_without_keys_do_not_count(no_key: float, sink: float | None) -> None:
    outs, lses = states(3, 2, 2, 3, 4, torch.float32)
    outs[1], lses[1] = math.nan, no_key
    outs[:, 1, :, 2], lses[:, 1, 2] = math.nan, no_key
    sinks = None if sink is None else torch.full((3,), sink)
    out, lse = check(outs, lses, sinks)
    assert out.isfinite().all()
    assert not out[1, :, 2].any()
    assert (lse[1, 2] == math.inf).all()


def test_extreme_lses_do_not_overflow() -> None:
    outs, _ = states(2, 1, 1, 2, 4, torch.float32)
    lses = torch.tensor([[3e38, -3e38], [-3e38, -3e38]])[:, None, :, None]
    out, lse = dsm.ops.merge_attention_states(outs, lses, torch.tensor([-1e30, -3e38]))
    assert torch.equal(out[0, 0, 0], outs[0, 0, 0, 0])
    torch.testing.assert_close(out[0, 0, 1], outs[:, 0, 0, 1].sum(0) / 3)
    assert torch.equal(lse, lses[:1].squeeze(0))


def test_nan_stays_in_its_query() -> None:
    outs, lses = states(2, 1, 2, 2, 4, torch.float32)
    clean, _ = dsm.ops.merge_attention_states(outs, lses)
    lses[1, 0, 1, 0] = math.nan
    out, lse = dsm.ops.merge_attention_states(outs, lses)
    assert out[0, 0, 1].isnan().all()
    assert lse.isnan().sum() == 1
    assert torch.equal(out[0, :, 0], clean[0, :, 0])
    assert torch.equal(out[0, 1], clean[0, 1])


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    lses=st.lists(st.one_of(st.floats(-50, 50), st.sampled_from(NO_KEY)), min_size=1, max_size=6),
    sink=st.one_of(st.none(), st.floats(-50, 50), st.sampled_from(NO_KEY)),
)
def test_merging_in_any_order_and_in_steps(lses: list[float], sink: float | None) -> None:
    outs = torch.randn(len(lses), 1, 1, 1, 3, dtype=torch.float64)
    stacked = torch.tensor(lses, dtype=torch.float64).reshape(-1, 1, 1, 1)
    sinks = None if sink is None else torch.tensor([sink], dtype=torch.float64)
    out, lse = check(outs, stacked, sinks)
    backwards = dsm.ops.merge_attention_states(outs.flip(0), stacked.flip(0), sinks)
    torch.testing.assert_close(backwards, (out, lse), rtol=1e-12, atol=1e-12)
    step = outs[0], stacked[0]
    for part in zip(outs[1:], stacked[1:], strict=True):
        step = dsm.ops.merge_attention_states(*(list(pair) for pair in zip(step, part, strict=True)))
    torch.testing.assert_close(
        dsm.ops.merge_attention_states([step[0]], [step[1]], sinks), (out, lse), rtol=1e-12, atol=1e-12
    )


def test_views_empty_problems_and_threads() -> None:
    outs, lses = states(2, 3, 40, 4, 33, torch.bfloat16)
    expected = dsm.ops.merge_attention_states(outs, lses)
    heads_first = outs.transpose(2, 3).contiguous().transpose(2, 3), lses.mT.contiguous().mT
    for result, truth in zip(dsm.ops.merge_attention_states(*heads_first), expected, strict=True):
        assert torch.equal(result, truth)
    assert_same_bits(lambda: dsm.ops.merge_attention_states(outs, lses))
    out, lse = dsm.ops.merge_attention_states(outs[:0], lses[:0])
    assert not out.any()
    assert (lse == math.inf).all()
    assert dsm.ops.merge_attention_states(outs[..., :0], lses)[0].shape == (3, 40, 4, 0)
    assert dsm.ops.merge_attention_states(outs[:, :0], lses[:, :0])[0].shape == (0, 40, 4, 33)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outs": torch.zeros(2, 1, 3, 4)}, r"outs must be \[parts, batch, s_q, h_q, d_v\]"),
        ({"outs": torch.zeros(2, 1, 3, 2, 4).int()}, "outs must be .* got .* int32"),
        ({"lses": torch.zeros(2, 1, 3, 2)}, r"lses must be \[parts, batch, h_q, s_q\]"),
        ({"lses": torch.zeros(2, 1, 2, 3).double()}, "lses must be .* float32, got .* float64"),
        ({"attn_sink": torch.zeros(3)}, r"attn_sink must be \[h_q\]"),
        ({"outs": []}, "outs must be one or more tensors .* got none"),
        ({"lses": [torch.zeros(1, 2, 3), torch.zeros(1, 2)]}, "lses must be one or more tensors of one shape"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    inputs: dict[str, Any] = {"outs": torch.zeros(2, 1, 3, 2, 4), "lses": torch.zeros(2, 1, 2, 3)}
    dsm.ops.merge_attention_states(**inputs)
    with pytest.raises(ValueError, match=message):
        dsm.ops.merge_attention_states(**{**inputs, **change})


def test_opcheck_and_compile() -> None:
    outs, lses = states(2, 1, 3, 2, 4, torch.float32)
    sink = torch.tensor([0.0, 1.0])
    torch.library.opcheck(torch.ops.dsm.merge_attention_states.default, (outs, lses, sink))
    compiled = torch.compile(dsm.ops.merge_attention_states, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(list(outs), list(lses), sink), check(outs, lses, sink), strict=True):
        assert torch.equal(a, b)
