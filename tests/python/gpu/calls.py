# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Calls of attention over caches, and of what fills them, that every implementation row on CUDA is proved with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from cache_layouts import e4m3, of_rows, plain, quantised
from hostile import INT_MAX, hide_unused, int32, lists, moved, pages_of, poisoned, widened
from torch import Tensor

import ds_flashdmla_moe as dsm

Arguments = dict[str, Any]
Results = tuple[Tensor, ...]
BF16 = torch.bfloat16
HOPPERS, PORTABLE = ("sm90", "cuda"), ("cuda",)
PROMPTS = ("prefill", *HOPPERS)


class Call(NamedTuple):
    """One way to call an operator.

    Attributes:
        operator: its word in the registry.
        label: what is particular.
        rows: the implementations that take it, on Hopper.
        drawn: makes arguments on the CPU, of the same shapes every time, with garbage in what is not read.
        run: the call; inserts give the cache that they filled.
        exact: the result has the CPU's bits; otherwise it is near the CPU's in float64.
    """

    operator: str
    label: str
    rows: tuple[str, ...]
    drawn: Callable[[], Arguments]
    run: Callable[..., Results]
    exact: bool = False

    def arguments(self, seed: int) -> Arguments:
        torch.manual_seed(seed)
        return self.drawn()

    def truth(self, arguments: Arguments) -> Results:
        return self.run(**(arguments if self.exact else _in_float64(arguments)))


def on_gpu(arguments: Arguments) -> Arguments:
    return {name: moved(value) for name, value in arguments.items()}


@contextmanager
def forced(operator: str, row: str) -> Iterator[None]:
    """Only this implementation runs; what it does not take is refused."""
    torch.ops.dsm.force_implementation(operator, row)
    try:
        yield
    finally:
        torch.ops.dsm.force_implementation(operator, "")


def same_bits(left: Results, right: Results) -> bool:
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(left, right, strict=True)
    )


def _in_float64(arguments: Arguments) -> Arguments:
    wide = {name: widened(value) for name, value in arguments.items()}
    if (scale := wide.pop("k_scale", None)) is not None:
        wide["k_cache"] = e4m3(wide["k_cache"]) * scale
    return wide


# --- mla_decode: from no key to `most` of them, the last page and all of others' tables garbage ---


def _dense(
    batch: int,
    s_q: int,
    h_q: int,
    page_size: int,
    dtype: torch.dtype = BF16,
    d_qk: int = 576,
    d_v: int = 512,
    most: int = 700,
    fp8: bool = False,
) -> Callable[[], Arguments]:
    def drawn() -> Arguments:
        lengths = torch.randint(most + 1, (batch,)).tolist()
        lengths[int(torch.randint(batch, ()))] = (0, 1, 63, 64, 65, most)[int(torch.randint(6, ()))]
        cache, table = pages_of(batch, page_size, 1, d_qk, -(-most // page_size))
        hide_unused(cache, table, lengths)
        codes = cache.to(torch.float8_e4m3fn).view(torch.uint8) if fp8 else None
        return {
            "q": torch.randn(batch, s_q, h_q, d_qk).to(dtype),
            "k_cache": cache.to(dtype) if codes is None else codes,
            "block_table": table,
            "cache_seqlens": int32(lengths),
            "d_v": d_v,
            "causal": True,
            **({} if codes is None else {"k_scale": torch.tensor([0.7])}),
        }

    return drawn


# --- sparse_mla_decode and sparse_mla_prefill: lists of rows and of what are none, two rows NaN ---


def _sinks(heads: int) -> Tensor:
    sink = torch.randn(heads)
    sink[0], sink[-1] = math.inf, -math.inf
    return sink


def _sparse(
    row_bytes: int, h_q: int, topk: int, extra_bytes: int | None = None, *, batch: int = 4, s_q: int = 2
) -> Callable[[], Arguments]:
    def drawn() -> Arguments:
        pool = of_rows(row_bytes, 9, 32, 64)
        width = pool.values.shape[1]
        arguments = {
            "q": torch.randn(batch, s_q, h_q, width).to(BF16),
            "k_cache": poisoned(pool),
            "indices": lists(batch, s_q, topk, 288),
            "topk_length": int32([INT_MAX, *torch.randint(-1, topk + 2, (batch - 1,)).tolist()]),
            "softmax_scale": width**-0.5 / 4,
            "attn_sink": _sinks(h_q),
        }
        if extra_bytes is None:
            return arguments
        return arguments | {
            "extra_k_cache": poisoned(of_rows(extra_bytes, 80, 2, -2 * extra_bytes % 16)),
            "extra_indices": lists(batch, s_q, 130, 160),
            "extra_topk_length": torch.randint(-1, 132, (batch,)).int(),
        }

    return drawn


def _prefill(
    s_q: int, h_q: int, d_qk: int, topk: int, *, dtype: torch.dtype = BF16, h_kv: int = 1, **options: Any
) -> Callable[[], Arguments]:
    def drawn() -> Arguments:
        kv = torch.randn(400, h_kv, d_qk).to(dtype)
        kv[-2:] = math.nan
        return {
            "q": torch.randn(s_q, h_q, d_qk).to(dtype),
            "kv": kv,
            "indices": lists(s_q, h_kv, topk, 400),
            "topk_length": torch.randint(-1, topk + 2, (s_q,)).int(),
            "attn_sink": _sinks(h_q),
            **options,
        }

    return drawn


# --- the caches and merging ---


def _slots(tokens: int, rows: int) -> Tensor:
    """Some rows several times, some tokens without a row."""
    slots = torch.randint(rows, (tokens,))
    slots[::5], slots[1::50] = -1, rows
    return slots


MARKED = 2500  # so many tokens that the last one of a row is found by marks in the workspace


def _insert(size: int, v4: bool = False, tokens: int = 333) -> Callable[[], Arguments]:
    """Into records of so many bytes; 0: into a bfloat16 cache."""

    def drawn() -> Arguments:
        cache = torch.full((7, 64, 1, size), 255).byte() if size else torch.zeros(7, 64, 1, 576).to(BF16)
        rows, slots = torch.randn(tokens, 576).to(BF16), _slots(tokens, 7 * 64)
        if not v4:
            return {"latent": rows[:, :512], "k_pe": rows[:, 512:], "cache": cache, "slots": slots}
        turned = {"positions": torch.randint(100_000, (tokens,)), "inv_freq": dsm.ops.rope_frequencies(64)}
        return {"kv": rows[:, :512].clone(), "cache": cache, "slots": slots, "weight": torch.rand(512), **turned}

    return drawn


def _insert_keys(tokens: int) -> Callable[[], Arguments]:
    def drawn() -> Arguments:
        cache = torch.full((7, 64, 1, 132), 255).byte()
        return {"k": torch.randn(tokens, 128).to(BF16), "cache": cache, "slots": _slots(tokens, 7 * 64)}

    return drawn


def _filled(insert: Callable[..., None]) -> Callable[..., Results]:
    def run(cache: Tensor, **arguments: Any) -> Results:
        mine = cache.clone()
        insert(cache=mine, **arguments)
        return (mine,)

    return run


def _gathered(**arguments: Any) -> Results:
    return (dsm.ops.kv_gather(**arguments),)


def _gather(size: int) -> Callable[[], Arguments]:
    def drawn() -> Arguments:
        pool = quantised(size, 9, 32, pad=64) if size else plain(576, 9, 32, BF16)
        return {"cache": poisoned(pool), "indices": lists(1, 1, 501, 288)[0, 0]}

    return drawn


def _states(parts: int) -> Callable[[], Arguments]:
    """Parts of which some have no key, and NaN as output there."""

    def drawn() -> Arguments:
        outs, lses = torch.randn(parts, 5, 2, 16, 512).to(BF16), 3 * torch.randn(parts, 5, 16, 2)
        nothing = torch.rand(lses.shape) < 0.3
        lses[nothing] = math.inf
        outs[nothing.transpose(2, 3)] = math.nan
        return {"outs": outs, "lses": lses, "attn_sink": _sinks(16)}

    return drawn


CALLS = (
    Call("mla_decode", "128 heads", HOPPERS, _dense(5, 2, 128, 64), dsm.ops.mla_decode),
    Call("mla_decode", "16 heads, float16", HOPPERS, _dense(7, 1, 16, 128, torch.float16), dsm.ops.mla_decode),
    Call("mla_decode", "20 heads, 4 positions", HOPPERS, _dense(3, 4, 20, 64), dsm.ops.mla_decode),
    Call("mla_decode", "one long request", HOPPERS, _dense(1, 1, 128, 64, most=9000), dsm.ops.mla_decode),
    Call("mla_decode", "512 columns", PORTABLE, _dense(3, 1, 64, 64, d_qk=512), dsm.ops.mla_decode),
    Call("mla_decode", "float32", PORTABLE, _dense(3, 2, 5, 7, torch.float32, 40, 33), dsm.ops.mla_decode),
    Call("mla_decode", "FP8 cache", PORTABLE, _dense(3, 2, 16, 64, fp8=True), dsm.ops.mla_decode),
    Call("sparse_mla_decode", "V3.2 FP8", HOPPERS, _sparse(656, 128, 200), dsm.ops.sparse_mla_decode),
    Call("sparse_mla_decode", "V3.2 FP4", HOPPERS, _sparse(352, 64, 129), dsm.ops.sparse_mla_decode),
    Call("sparse_mla_decode", "V4", HOPPERS, _sparse(584, 64, 128, 584), dsm.ops.sparse_mla_decode),
    Call("sparse_mla_decode", "V4, 16 heads", HOPPERS, _sparse(584, 16, 70, 584, s_q=1), dsm.ops.sparse_mla_decode),
    Call("sparse_mla_decode", "V4.1", HOPPERS, _sparse(528, 40, 65, 528), dsm.ops.sparse_mla_decode),
    Call("sparse_mla_decode", "V4.1, FP4", HOPPERS, _sparse(528, 128, 64, 288), dsm.ops.sparse_mla_decode),
    Call("sparse_mla_decode", "two formats", PORTABLE, _sparse(656, 16, 70, 352), dsm.ops.sparse_mla_decode),
    Call("sparse_mla_decode", "bfloat16", HOPPERS, _sparse(1152, 16, 200), dsm.ops.sparse_mla_decode),
    Call("sparse_mla_decode", "bfloat16, 512 columns", HOPPERS, _sparse(1024, 128, 64, 1024),
         dsm.ops.sparse_mla_decode),
    Call("sparse_mla_decode", "bfloat16, 544 columns", PORTABLE, _sparse(1088, 16, 70), dsm.ops.sparse_mla_decode),
    Call("sparse_mla_decode", "prompts, V3.2", PROMPTS, _sparse(656, 20, 65, batch=2, s_q=264),
         dsm.ops.sparse_mla_decode),
    Call("sparse_mla_decode", "prompts, V4.1", PROMPTS, _sparse(528, 16, 33, 288, batch=2, s_q=264),
         dsm.ops.sparse_mla_decode),
    Call("sparse_mla_decode", "prompts, bfloat16", PROMPTS, _sparse(1024, 17, 33, 1024, batch=1, s_q=264),
         dsm.ops.sparse_mla_decode),
    Call("sparse_mla_prefill", "V3.2", HOPPERS, _prefill(9, 128, 576, 200), dsm.ops.sparse_mla_prefill),
    Call("sparse_mla_prefill", "V4", HOPPERS, _prefill(150, 64, 512, 129), dsm.ops.sparse_mla_prefill),
    Call("sparse_mla_prefill", "float16", HOPPERS, _prefill(5, 20, 576, 65, dtype=torch.float16),
         dsm.ops.sparse_mla_prefill),
    Call("sparse_mla_prefill", "key_probs", PORTABLE, _prefill(5, 16, 576, 100, return_key_probs=True),
         dsm.ops.sparse_mla_prefill),
    Call("sparse_mla_prefill", "two key heads", PORTABLE, _prefill(5, 6, 24, 33, h_kv=2, d_v=16),
         dsm.ops.sparse_mla_prefill),
    *(
        Call("mla_kv_insert", f"{size} bytes", PORTABLE, _insert(size), _filled(dsm.ops.mla_kv_insert), exact=True)
        for size in (656, 352, 0)
    ),
    *(
        Call("v4_kv_insert", f"{size} bytes", PORTABLE, _insert(size, True), _filled(dsm.ops.v4_kv_insert), exact=True)
        for size in (584, 528, 288)
    ),
    *(
        Call("indexer_k_insert", f"{tokens} tokens", PORTABLE, _insert_keys(tokens), _filled(dsm.ops.indexer_k_insert),
             exact=True)
        for tokens in (333, MARKED)
    ),
    *(
        Call("mla_kv_insert", f"{size} bytes, {MARKED} tokens", PORTABLE, _insert(size, tokens=MARKED),
             _filled(dsm.ops.mla_kv_insert), exact=True)
        for size in (656, 0)
    ),
    Call("v4_kv_insert", f"584 bytes, {MARKED} tokens", PORTABLE, _insert(584, True, MARKED),
         _filled(dsm.ops.v4_kv_insert), exact=True),
    *(
        Call("kv_gather", f"{size} bytes", PORTABLE, _gather(size), _gathered, exact=True)
        for size in (656, 352, 584, 528, 288, 0)
    ),
    *(
        Call("merge_attention_states", f"{parts} parts", PORTABLE, _states(parts), dsm.ops.merge_attention_states)
        for parts in (1, 2, 9)
    ),
)  # fmt: skip
