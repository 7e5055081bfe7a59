# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ds_flashdmla_moe.ops import sparse_mla_prefill, v4_attention_indices


def brute_force(lengths: list[int], window: int, ratio: int, selected: Tensor | None) -> list[list[int]]:
    """Every token's keys, each row of kv being asked for: is it one?"""
    rows = [("token", s, i) for s, n in enumerate(lengths) for i in range(n)]
    tokens = list(rows)
    if ratio:
        rows += [("entry", s, i) for s, n in enumerate(lengths) for i in range(n // ratio)]
    result = []
    for index, (_, s, t) in enumerate(tokens):
        chosen = None if selected is None else selected[index].tolist()
        keys = []
        for row, (kind, other, i) in enumerate(rows):
            if other != s:
                continue
            if kind == "token":
                keys += [row] if max(0, t - window + 1) <= i <= t else []
            elif ratio * (i + 1) - 1 <= t:  # the entry's last token has been seen
                keys += [row] * (1 if chosen is None else chosen.count(i))
        result.append(keys)
    return result


@pytest.mark.parametrize("window", [1, 3, 4, 8, 100])
@pytest.mark.parametrize(
    ("ratio", "choose"),
    [(0, False), *((ratio, choose) for ratio in (1, 3, 4, 16) for choose in (False, True))],
)
def test_against_every_pair(window: int, ratio: int, choose: bool) -> None:
    near = sorted({n + d for n in (window % 90, ratio) for d in (-1, 0, 1)} - {-1})
    for lengths in ([n] for n in [*near, 33]):
        check(lengths, window, ratio, choose)
    check([*near, 0, 33, 2], window, ratio, choose)


def check(lengths: list[int], window: int, ratio: int, choose: bool) -> None:
    tokens, selected = sum(lengths), None
    if choose:
        selected = torch.randint(-1, max(lengths) // ratio + 2, (tokens, 5), dtype=torch.int32)
        selected[:, 3:4] = torch.tensor([-(2**31), 2**31 - 1])[torch.randint(2, (tokens, 1))].int()
    indices = v4_attention_indices(lengths, window, ratio, selected)
    entries = 5 if choose else max(lengths) // ratio if ratio else 0
    assert indices.shape == (tokens, 1, min(window, max(lengths)) + entries)
    assert indices.dtype == torch.int32
    expected = brute_force(lengths, window, ratio, selected)
    assert [sorted(x for x in row if x != -1) for row in indices[:, 0].tolist()] == expected
    assert (indices >= -1).all()


def test_order_and_padding() -> None:
    assert v4_attention_indices([3, 2], 2, 2).tolist() == [
        [[-1, 0, -1]],
        [[0, 1, 5]],
        [[1, 2, 5]],
        [[-1, 3, -1]],
        [[3, 4, 6]],
    ]
    selected = torch.tensor([[0, -1], [0, 0], [1, 0], [0, 1], [1, 0]])
    assert v4_attention_indices([5], 1, 2, selected)[:, 0, 1:].tolist() == [[-1, -1], [5, 5], [-1, 5], [5, 6], [6, 5]]


def test_nothing() -> None:
    assert v4_attention_indices([], 4, 2).shape == (0, 1, 0)
    assert v4_attention_indices([0, 0], 4).shape == (0, 1, 0)


def test_window_alone_is_banded_attention() -> None:
    q, kv = torch.randn(9, 2, 8), torch.randn(9, 1, 8)
    out, _, _ = sparse_mla_prefill(q, kv, v4_attention_indices([9], 3), 1.0, 8)
    at = torch.arange(9)
    seen = (at[:, None] >= at) & (at[:, None] < at + 3)
    k = kv.transpose(0, 1).expand(2, 9, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), k, k, seen, scale=1.0)
    torch.testing.assert_close(out, expected.transpose(0, 1))


def test_bad_arguments_are_refused() -> None:
    chosen = torch.zeros(3, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="lengths must be at least 0, got -1"):
        v4_attention_indices([4, -1], 2, 2)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        v4_attention_indices([3], 0)
    with pytest.raises(ValueError, match="ratio must be at least 0, got -1"):
        v4_attention_indices([3], 2, -1)
    with pytest.raises(ValueError, match="selected must be None without entries"):
        v4_attention_indices([3], 2, 0, chosen)
    for bad in (chosen[:2], chosen[0], chosen.float()):
        with pytest.raises(ValueError, match=r"selected must be \[tokens, topk\] = \[3, topk\] int32 or int64"):
            v4_attention_indices([3], 2, 1, bad)
