# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""DeepSeek-V4's attention, composed from the operators: whole sequences, and token by token through paged caches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ds_flashdmla_moe import ops

EPS = 1e-6
HIDDEN, HEADS, D, D_ROPE, GROUPS, RANK = 20, 4, 24, 8, 2, 6
INDEX_HEADS, INDEX_D, INDEX_ROPE = 3, 16, 8
WINDOW = 5


@dataclass
class Layer:
    """A layer's weights, and which entries it has: ratio 0 none, with an indexer of ``topk``, or all (topk 0)."""

    ratio: int
    topk: int
    wide: torch.dtype

    def __post_init__(self) -> None:
        def weight(*shape: int) -> Tensor:
            return (torch.randn(shape, dtype=torch.float64) / math.sqrt(shape[-1])).to(self.wide)

        coff = self.coff = 2 if self.topk else 1
        self.wq, self.wkv = weight(HEADS * D, HIDDEN), weight(D, HIDDEN)
        self.kv_norm, self.c_norm, self.index_norm = 1 + weight(D), 1 + weight(D), 1 + weight(INDEX_D)
        self.wa, self.wz, self.ape = weight(coff * D, HIDDEN), weight(coff * D, HIDDEN), weight(self.ratio, coff * D)
        self.index_wq, self.index_w = weight(INDEX_HEADS * INDEX_D, HIDDEN), weight(INDEX_HEADS, HIDDEN)
        self.index_wa, self.index_wz = weight(coff * INDEX_D, HIDDEN), weight(coff * INDEX_D, HIDDEN)
        self.index_ape = weight(self.ratio, coff * INDEX_D)
        self.sink = weight(HEADS)
        self.wo_a = weight(GROUPS * RANK, HEADS // GROUPS * D)
        self.inv_freq = ops.rope_frequencies(D_ROPE, base=160.0)
        self.index_freq = ops.rope_frequencies(INDEX_ROPE, base=160.0)


# --- the specification, in float64, one query and one entry at a time ---


def _rms(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def _turn(x: Tensor, position: int, inv_freq: Tensor, sign: float = 1.0) -> Tensor:
    angle = sign * (torch.tensor(float(position)) * inv_freq).double()  # the angle is float32 by definition
    kept, a, b = x[..., : -2 * len(angle)], x[..., -2 * len(angle) :: 2], x[..., -2 * len(angle) + 1 :: 2]
    turned = torch.stack((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1).flatten(-2)
    return torch.cat((kept, turned), -1)


def _entry(layer: Layer, a: Tensor, z: Tensor, i: int, norm: Tensor, inv_freq: Tensor) -> Tensor:
    """Entry i of the tokens' a and z (ape added), normalised and rotated."""
    r, d = layer.ratio, a.shape[1] // layer.coff
    own = slice(r * i, r * (i + 1))
    values, scores = a[own, -d:], z[own, -d:]
    if layer.coff == 2 and i > 0:
        before = slice(r * (i - 1), r * i)
        values, scores = torch.cat((a[before, :d], values)), torch.cat((z[before, :d], scores))
    return _turn(_rms((scores.softmax(0) * values).sum(0), norm), r * i, inv_freq)


def _hadamard(x: Tensor) -> Tensor:
    n = x.shape[-1]
    signs = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(n)] for i in range(n)], dtype=torch.float64)
    return x @ signs / math.sqrt(n)


def _selected(layer: Layer, x: Tensor, t: int) -> list[int]:
    complete = (t + 1) // layer.ratio
    if not layer.topk:
        return list(range(complete))
    phase = torch.arange(len(x)) % layer.ratio
    a, z = x @ layer.index_wa.double().T, x @ layer.index_wz.double().T + layer.index_ape.double()[phase]
    q = _hadamard(_turn((x[t] @ layer.index_wq.double().T).view(INDEX_HEADS, INDEX_D), t, layer.index_freq))
    scores = [
        float((x[t] @ layer.index_w.double().T) @ (q @ _hadamard(key)).clamp_min(0))
        for i in range(complete)
        for key in [_entry(layer, a, z, i, layer.index_norm.double(), layer.index_freq)]
    ]
    return sorted(sorted(range(complete), key=lambda i: (-scores[i], i))[: layer.topk])


def _truth(layer: Layer, x: Tensor) -> Tensor:
    x, outputs = x.double(), []
    kv = _rms(x @ layer.wkv.double().T, layer.kv_norm.double())
    rows = [_turn(kv[t], t, layer.inv_freq) for t in range(len(x))]
    entries: list[Tensor] = []
    if layer.ratio:
        phase = torch.arange(len(x)) % layer.ratio
        a, z = x @ layer.wa.double().T, x @ layer.wz.double().T + layer.ape.double()[phase]
        c_norm = layer.c_norm.double()
        entries = [_entry(layer, a, z, i, c_norm, layer.inv_freq) for i in range(len(x) // layer.ratio)]
    for t in range(len(x)):
        q = _turn(_rms((x[t] @ layer.wq.double().T).view(HEADS, D)), t, layer.inv_freq)
        keys = rows[max(0, t - WINDOW + 1) : t + 1] + [entries[i] for i in (_selected(layer, x, t) if entries else [])]
        k = torch.stack(keys)
        logits = torch.cat((q @ k.T / math.sqrt(D), layer.sink.double()[:, None]), 1)
        o = _turn(logits.softmax(1)[:, :-1] @ k, t, layer.inv_freq, -1.0).view(GROUPS, -1)
        outputs.append((o[:, None] @ layer.wo_a.double().view(GROUPS, RANK, -1).transpose(1, 2)).flatten())
    return torch.stack(outputs)


# --- the operators ---


def _queries(layer: Layer, x: Tensor, positions: Tensor) -> Tensor:
    return ops.v4_q_norm_rope((x @ layer.wq.T).view(-1, HEADS, D), positions, layer.inv_freq, EPS)


def _index_queries(layer: Layer, x: Tensor, positions: Tensor) -> Tensor:
    q = ops.rope((x @ layer.index_wq.T).view(-1, INDEX_HEADS, INDEX_D), positions, layer.index_freq)
    return ops.hadamard_quantize(q)  # type: ignore[return-value]


def _finish(c: Tensor, at: Tensor, norm: Tensor, inv_freq: Tensor) -> Tensor:
    return ops.rope(ops.rms_norm(c, norm, EPS)[:, None], at, inv_freq)[:, 0]


def _prefill(layer: Layer, x: Tensor) -> Tensor:
    positions = torch.arange(len(x))
    kv = _finish(x @ layer.wkv.T, positions, layer.kv_norm, layer.inv_freq)
    selected = None
    if layer.ratio:
        at = torch.arange(len(x) // layer.ratio) * layer.ratio
        c, _ = ops.kv_compress(x @ layer.wa.T, x @ layer.wz.T, layer.ape, overlap=layer.coff == 2)
        kv = torch.cat((kv, _finish(c, at, layer.c_norm, layer.inv_freq)))
        if layer.topk:
            keys, _ = ops.kv_compress(x @ layer.index_wa.T, x @ layer.index_wz.T, layer.index_ape, overlap=True)
            keys = ops.hadamard_quantize(_finish(keys, at, layer.index_norm, layer.index_freq))  # type: ignore[assignment]
            complete = ((positions + 1) // layer.ratio).int()
            logits = ops.indexer_logits(_index_queries(layer, x, positions), keys, x @ layer.index_w.T, ends=complete)
            selected = ops.indexer_topk(logits.float(), layer.topk, ends=complete)
    lists = ops.v4_attention_indices([len(x)], WINDOW, layer.ratio, selected)
    q = _queries(layer, x, positions)
    o, _, _ = ops.sparse_mla_prefill(q, kv[:, None], lists, D**-0.5, D, layer.sink)
    return ops.v4_output_projection(o, positions, layer.inv_freq, layer.wo_a, GROUPS)


class Decoder:
    """Two requests, one idle after its end, with pages in a scattered order and garbage wherever nothing is stored."""

    PAGE = 3

    def __init__(self, layer: Layer, tokens: int, pool: Callable[..., Tensor]) -> None:
        self.layer, self.pages = layer, -(-tokens // self.PAGE)
        scattered = torch.randperm(2 * self.pages, dtype=torch.int32)
        self.table = scattered.view(2, self.pages)
        self.rows, self.entries = (pool(2 * self.pages, self.PAGE, 1, D) for _ in range(2))
        self.index_keys = pool(2 * self.pages, self.PAGE, 1, INDEX_D)
        self.state = pool(2 * self.pages, self.PAGE, 2 * layer.coff * D)
        self.index_state = pool(2 * self.pages, self.PAGE, 2 * layer.coff * INDEX_D)

    def _row(self, request: Tensor, position: Tensor) -> Tensor:
        page = self.table[request, (position // self.PAGE).clamp(0, self.pages - 1)].long()
        return torch.where(position >= 0, page * self.PAGE + position % self.PAGE, -1)

    def step(self, x: Tensor, positions: Tensor) -> Tensor:
        """One token of each request."""
        layer, both = self.layer, torch.arange(2)
        offsets = torch.arange(3, dtype=torch.int32)
        kv = x @ layer.wkv.T
        ops.v4_kv_insert(kv, self.rows, self._row(both, positions), layer.kv_norm, EPS, positions, layer.inv_freq)
        complete = (positions + 1) // layer.ratio if layer.ratio else torch.zeros_like(positions)
        extra = torch.full((2, 1), -1)
        if layer.ratio:
            done = (positions + 1) % layer.ratio == 0

            def compressed(wa: Tensor, wz: Tensor, ape: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                c, tokens = ops.kv_compress(
                    x @ wa.T,
                    x @ wz.T,
                    ape,
                    offsets,
                    overlap=layer.coff == 2,
                    start_positions=positions,
                    state=state,
                    block_table=self.table,
                )
                assert tokens[tokens >= 0].tolist() == both[done].tolist()
                owner = tokens.long().clamp_min(0)
                entry = torch.where(tokens >= 0, complete[owner] - 1, -1)
                return c, entry * layer.ratio, self._row(owner, entry)

            c, at, slots = compressed(layer.wa, layer.wz, layer.ape, self.state)
            ops.v4_kv_insert(c, self.entries, slots, layer.c_norm, EPS, at.clamp_min(0), layer.inv_freq)
            entries = torch.arange(self.pages * self.PAGE).expand(2, -1)
            if layer.topk:
                c, at, slots = compressed(layer.index_wa, layer.index_wz, layer.index_ape, self.index_state)
                keys = _finish(c, at.clamp_min(0), layer.index_norm, layer.index_freq)
                ops.v4_kv_insert(ops.hadamard_quantize(keys), self.index_keys, slots)  # type: ignore[arg-type]
                logits = ops.paged_indexer_logits(
                    _index_queries(layer, x, positions)[:, None],
                    self.index_keys,
                    (x @ layer.index_w.T)[:, None],
                    complete[:, None].int(),
                    self.table,
                )
                entries = ops.indexer_topk(logits[:, 0].float(), layer.topk, ends=complete.int()).long()
            entries = torch.where(entries < complete[:, None], entries, -1)
            extra = self._row(both[:, None], entries)
        window = self._row(both[:, None], positions[:, None] - torch.arange(WINDOW))
        o, _ = ops.sparse_mla_decode(
            _queries(layer, x, positions)[:, None],
            self.rows,
            window[:, None].int(),
            D,
            softmax_scale=D**-0.5,
            attn_sink=layer.sink,
            extra_k_cache=self.entries,
            extra_indices=extra[:, None].int(),
        )
        return ops.v4_output_projection(o[:, 0], positions, layer.inv_freq, layer.wo_a, GROUPS)


@pytest.mark.parametrize("wide", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("ratio", "topk"), [(0, 0), (4, 3), (6, 0)], ids=["window", "indexer", "all"])
def test_prefill_and_decode_follow_the_specification(ratio: int, topk: int, wide: torch.dtype) -> None:
    layer, tokens = Layer(ratio, topk, wide), 29
    x = torch.randn(tokens, HIDDEN, dtype=wide)
    truth = _truth(layer, x)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[wide]
    prefilled = _prefill(layer, x)
    assert prefilled.dtype == wide
    assert (prefilled - truth).abs().max() <= tolerance * truth.abs().max()

    decoder = Decoder(layer, tokens, lambda *shape: torch.full(shape, math.nan, dtype=wide))
    late = 3  # the second request starts so many steps later
    decoded = torch.empty_like(truth).expand(2, -1, -1).clone()
    for step in range(tokens):
        positions = torch.tensor([step, max(step - late, 0)])
        decoded[torch.arange(2), positions] = decoder.step(x[positions], positions).double()
    assert (decoded[0] - truth).abs().max() <= tolerance * truth.abs().max()
    seen = tokens - late
    assert (decoded[1, :seen] - truth[:seen]).abs().max() <= tolerance * truth.abs().max()
