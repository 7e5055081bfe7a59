# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ds_flashdmla_moe as dsm
from threads import assert_same_bits

INT_MIN, INT_MAX = -(2**31), 2**31 - 1


def select(row: list[float], topk: int, start: int = 0, end: int = INT_MAX) -> list[int]:
    """By sorting: value, then index."""
    seen = [j for j in range(max(start, 0), min(end, len(row))) if row[j] > -math.inf]
    chosen = sorted(sorted(seen, key=lambda j: (-row[j], j))[:topk])
    return chosen + [-1] * (topk - len(chosen))


VALUES = st.one_of(
    st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 3.4e38, -3.4e38])
)
LIMITS = st.one_of(st.integers(-2, 42), st.sampled_from([INT_MIN, INT_MAX]))


@settings(max_examples=400, deadline=None)
@given(st.lists(VALUES, max_size=40), st.integers(0, 45), LIMITS, LIMITS)
def test_any_row_is_selected_as_by_sorting(row: list[float], topk: int, start: int, end: int) -> None:
    logits = torch.tensor([row], dtype=torch.float32).view(1, len(row))
    limits = {"starts": torch.tensor([start], dtype=torch.int32), "ends": torch.tensor([end], dtype=torch.int32)}
    assert dsm.ops.indexer_topk(logits, topk, **limits).tolist() == [select(row, topk, start, end)]
    assert dsm.ops.indexer_topk(logits, topk).tolist() == [select(row, topk)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 300), st.integers(1, 6), st.integers(0, 2**31))
def test_long_rows_with_ties(n: int, topk: int, different: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(different, (1, n), generator=generator).float() * 1e-3
    assert dsm.ops.indexer_topk(logits, topk).tolist() == [select(logits[0].tolist(), topk)]


def test_golden_rows() -> None:
    logits = torch.tensor(
        [
            [1.0, 3.0, 3.0, 2.0, 3.0],
            [0.0, -0.0, 0.0, -0.0, -1.0],
            [-math.inf, math.nan, -5.0, math.inf, -math.inf],
            [math.nan] * 5,
        ]
    )
    assert dsm.ops.indexer_topk(logits, 2).tolist() == [[1, 2], [0, 1], [2, 3], [-1, -1]]
    assert dsm.ops.indexer_topk(logits, 4).tolist() == [[1, 2, 3, 4], [0, 1, 2, 3], [2, 3, -1, -1], [-1] * 4]


def test_neighbouring_values_in_every_digit() -> None:
    # Values that differ by one unit in the last place, and by one bit of each digit of the selection.
    bits = torch.tensor([0x3F800000, 0x3F800001, 0x3F800400, 0x3FA00000, 0xBF800000 - 2**32, 0xBF800001 - 2**32])
    logits = bits.to(torch.int32).view(torch.float32).repeat(500)[None]
    row = logits[0].tolist()
    for topk in (1, 499, 501, 1000, 1500, 2000, 2400, 2600, 2999):
        assert dsm.ops.indexer_topk(logits, topk).tolist() == [select(row, topk)]


def test_a_million_entries() -> None:
    logits = torch.randn(1, 1 << 20)
    chosen = dsm.ops.indexer_topk(logits, 2048)
    assert torch.equal(chosen[0].long(), logits[0].topk(2048).indices.sort().values)


def test_short_rows_give_all_visible() -> None:
    logits = torch.randn(3, 10)
    ends = torch.tensor([4, 0, 6], dtype=torch.int32)
    chosen = dsm.ops.indexer_topk(logits, 6, ends)
    assert chosen.tolist() == [[0, 1, 2, 3, -1, -1], [-1] * 6, [0, 1, 2, 3, 4, 5]]


def test_garbage_beyond_the_range_is_not_read_as_a_value() -> None:
    logits = torch.randn(2, 50)
    limits = {"starts": torch.tensor([3, 10], dtype=torch.int32), "ends": torch.tensor([40, 12], dtype=torch.int32)}
    clean = dsm.ops.indexer_topk(logits, 8, **limits)
    logits[0, :3] = logits[0, 40:] = logits[1, :10] = logits[1, 12:] = math.inf
    assert torch.equal(dsm.ops.indexer_topk(logits, 8, **limits), clean)


def test_empty_problems() -> None:
    assert dsm.ops.indexer_topk(torch.zeros(0, 5), 2).shape == (0, 2)
    assert dsm.ops.indexer_topk(torch.zeros(2, 5), 0).shape == (2, 0)
    assert dsm.ops.indexer_topk(torch.zeros(2, 0), 3).tolist() == [[-1] * 3] * 2


def test_strided_rows_and_same_bits() -> None:
    wide = torch.randn(200, 300).mul(3).round()
    part = wide[:, 7:290]
    assert torch.equal(dsm.ops.indexer_topk(part, 20), dsm.ops.indexer_topk(part.contiguous(), 20))
    assert torch.equal(dsm.ops.indexer_topk(wide.T, 20), dsm.ops.indexer_topk(wide.T.contiguous(), 20))
    assert_same_bits(lambda: [dsm.ops.indexer_topk(part, 20)])


def test_composes_with_the_logits() -> None:
    logits = dsm.ops.indexer_logits(
        torch.randn(6, 4, 16), torch.randn(30, 16), torch.randn(6, 4), ends=torch.arange(6, dtype=torch.int32)
    )
    chosen = dsm.ops.indexer_topk(logits, 3)
    assert chosen.tolist() == [select(row, 3) for row in logits.tolist()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits": torch.zeros(4)}, "logits must be of 2 dimensions"),
        ({"logits": torch.zeros(2, 4).double()}, r"logits must be \[rows, n\] .* float32, got .* float64"),
        ({"topk": -1}, "topk must be at least 0, got -1"),
        ({"ends": torch.zeros(3, dtype=torch.int32)}, r"ends must be \[rows\] = \[2\] int32"),
        ({"starts": torch.zeros(2)}, r"starts must be \[rows\] = \[2\] int32, got \[2\] float32"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dsm.ops.indexer_topk(**({"logits": torch.zeros(2, 4), "topk": 2} | arguments))


def test_opcheck_and_compile() -> None:
    logits, ends = torch.randn(3, 9), torch.tensor([9, 2, 0], dtype=torch.int32)
    torch.library.opcheck(torch.ops.dsm.indexer_topk.default, (logits, 4, ends, None))

    def chosen(values: Tensor) -> Tensor:
        return dsm.ops.indexer_topk(values, 4, ends)

    assert torch.equal(torch.compile(chosen, fullgraph=True, backend="aot_eager")(logits), chosen(logits))
    assert not chosen(logits.requires_grad_()).requires_grad
