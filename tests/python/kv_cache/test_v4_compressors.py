# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""DeepSeek-V4's compressors and its indexer composed from the operators, against their formulas in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import ds_flashdmla_moe as dsm
from tolerance import assert_close

HIDDEN, D, D_ROPE, PAGE = 24, 32, 16, 3


@dataclass
class Compressor:
    ratio: int
    overlap: bool
    rotate: bool  # the indexer's, which turns its entries by a Hadamard matrix

    def __post_init__(self) -> None:
        channels = D * (2 if self.overlap else 1)
        self.wkv, self.wgate = torch.randn(2, channels, HIDDEN) * HIDDEN**-0.5
        self.ape = torch.randn(self.ratio, channels)
        self.norm = torch.rand(D) + 0.5
        self.inv_freq = dsm.ops.rope_frequencies(D_ROPE, 160000, factor=16, original_length=65536)

    def truth(self, x: Tensor) -> Tensor:
        """Entries of one sequence, by the specification's text."""
        a, z = x.double() @ self.wkv.double().T, x.double() @ self.wgate.double().T
        entries = []
        for i in range(x.shape[0] // self.ratio):
            values, scores = [], []
            for group, part in [(i - 1, slice(0, D)), (i, slice(-D, None))][not self.overlap :]:
                for j in range(self.ratio if group >= 0 else 0):
                    values.append(a[self.ratio * group + j, part])
                    scores.append(z[self.ratio * group + j, part] + self.ape.double()[j, part])
            c = (torch.stack(scores).softmax(0) * torch.stack(values)).sum(0)
            c = c * torch.rsqrt(c.square().mean() + 1e-6) * self.norm.double()
            angle = (torch.tensor(float(self.ratio * i)) * self.inv_freq).double()
            even, odd = c[D - D_ROPE :: 2].clone(), c[D - D_ROPE + 1 :: 2].clone()
            c[D - D_ROPE :: 2] = even * angle.cos() - odd * angle.sin()
            c[D - D_ROPE + 1 :: 2] = even * angle.sin() + odd * angle.cos()
            entries.append(c)
        c = torch.stack(entries) if entries else x.new_zeros(0, D).double()
        if not self.rotate:
            return c
        signs = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(D)] for i in range(D)])
        return c @ signs.double() * D**-0.5

    def entries(
        self, x: Tensor, positions: Tensor, cu_seqlens: Tensor, **state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the packed tokens complete, pooled only; the token of each entry (-1: none) and its rotary position."""
        c, tokens = dsm.ops.kv_compress(
            x @ self.wkv.T, x @ self.wgate.T, self.ape, cu_seqlens, overlap=self.overlap, **state
        )
        first = positions[tokens.clamp_min(0)] - (self.ratio - 1)
        return c, tokens, first.masked_fill(tokens < 0, 0)


def insert(
    compressor: Compressor,
    cache: Tensor,
    block_table: Tensor,
    lengths: list[int],
    starts: list[int],
    x: Tensor,
    state: dict[str, Tensor] | None = None,
) -> None:
    """One call of the model: chunks of several requests, their new entries put into the paged cache."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
    request = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    c, tokens, first = compressor.entries(x, positions, cu_seqlens, **(state or {}))
    entry = first // compressor.ratio
    page = block_table[request[tokens.clamp_min(0)], entry // PAGE]
    slots = (page.long() * PAGE + entry % PAGE).masked_fill(tokens < 0, -1)
    if compressor.rotate:
        c = dsm.ops.rms_norm(c, compressor.norm)
        c = dsm.ops.rope(c[:, None], first, compressor.inv_freq)[:, 0]
        dsm.ops.v4_kv_insert(dsm.ops.hadamard_quantize(c), cache, slots)
    else:
        dsm.ops.v4_kv_insert(c, cache, slots, compressor.norm, 1e-6, first, compressor.inv_freq)


def fresh_cache(batch: int, most: int) -> tuple[Tensor, Tensor]:
    columns = -(-most // PAGE)
    cache = torch.full((batch * columns, PAGE, 1, D), math.nan)
    return cache, torch.randperm(batch * columns).int().view(batch, columns)


@pytest.mark.parametrize("rotate", [False, True], ids=["main", "indexer"])
@pytest.mark.parametrize(("ratio", "overlap"), [(4, True), (16, False)])
def test_prompts_and_single_tokens_fill_the_cache(ratio: int, overlap: bool, rotate: bool) -> None:
    compressor = Compressor(ratio, overlap, rotate)
    prompts, steps = [0, 5, 2 * ratio, 3 * ratio - 1], ratio + 3
    x = [torch.randn(prompt + steps, HIDDEN) for prompt in prompts]
    cache, table = fresh_cache(len(prompts), 5)
    kept = ratio * (2 if overlap else 1)
    state = {
        "state": torch.full((2 * len(prompts), kept // 2, 2 * compressor.ape.shape[1]), math.nan),
        "block_table": torch.randperm(2 * len(prompts)).int().view(-1, 2),
    }
    calls = [(prompts, [0] * len(prompts))]
    calls += [([1] * len(prompts), [prompt + step for prompt in prompts]) for step in range(steps)]
    for lengths, starts in calls:
        chunk = torch.cat([x[b][s : s + n] for b, (s, n) in enumerate(zip(starts, lengths, strict=True))])
        insert(compressor, cache, table, lengths, starts, chunk, state | {"start_positions": torch.tensor(starts)})
    for b, tokens in enumerate(x):
        expected = compressor.truth(tokens)
        i = torch.arange(expected.shape[0])
        rows = dsm.ops.kv_gather(cache, (table[b, i // PAGE] * PAGE + i % PAGE).int(), torch.float32)
        assert_close(f"request {b}", rows, expected)
    assert cache.isnan().any(), "the cache holds more rows than there are entries"


def test_the_indexer_selects_the_entries_with_the_largest_scores() -> None:
    compressor = Compressor(4, True, True)
    tokens, heads, topk = 50, 3, 5
    x = torch.randn(tokens, HIDDEN)
    q, weights = torch.randn(tokens, heads, D), torch.randn(tokens, heads)
    cache, table = fresh_cache(1, 12)
    insert(compressor, cache, table, [tokens], [0], x)
    visible = ((torch.arange(tokens) + 1) // 4).int()
    logits = dsm.ops.paged_indexer_logits(
        dsm.ops.hadamard_quantize(q)[None], cache, weights[None], visible[None], table, tokens // 4
    )[0]
    chosen = dsm.ops.indexer_topk(logits, topk, visible)

    # The rotation of both sides cancels in the scores.
    keys = dsm.ops.hadamard_quantize(compressor.truth(x))
    scores = torch.einsum("ihd,jd->ihj", q.double(), keys).relu()
    scores = (scores * weights.double()[..., None]).sum(1)
    for t in range(tokens):
        n = int(visible[t])
        assert (logits[t, n:] == -math.inf).all()
        assert_close(f"token {t}", logits[t, :n], scores[t, :n], scale=50.0)
        best = sorted(scores[t, :n].sort(descending=True, stable=True).indices[:topk].tolist())
        assert chosen[t].tolist() == best + [-1] * (topk - len(best))


def test_fp8_keys_of_the_indexer() -> None:
    """PROD's recipe: keys by indexer_k_insert, queries in FP8 with their scales in the weights."""
    compressor = Compressor(4, True, True)
    tokens, heads = 50, 3
    keys = compressor.truth(torch.randn(tokens, HIDDEN)).float()
    q, weights = torch.randn(tokens, heads, D), torch.randn(tokens, heads)
    cache = torch.full((4, PAGE + 1, 1, D + 4), 0xFF, dtype=torch.uint8)
    table = torch.tensor([[2, 0, 3]], dtype=torch.int32)
    i = torch.arange(keys.shape[0])
    dsm.ops.indexer_k_insert(keys, cache, table[0, i // 4].long() * 4 + i % 4)
    q8, q_scale = dsm.ops.hadamard_quantize(q, "fp8")
    lens = torch.full((1, tokens), keys.shape[0], dtype=torch.int32)
    logits = dsm.ops.paged_indexer_logits(q8[None], cache, (weights * q_scale)[None], lens, table)
    k8, k_scale = dsm.ops.hadamard_quantize(keys, "fp8", rotate=False)
    expected = dsm.ops.indexer_logits(q8, k8, weights * q_scale, k_scale)
    assert torch.equal(logits[0], expected)
