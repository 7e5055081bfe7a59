# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""FlashMLA's functions do on CUDA what they do on the CPU: results, plans, and every refusal by the same words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache_layouts import quantised
from hostile import CUDA, int32
from torch import Tensor

import ds_flashdmla_moe as dsm
from ds_flashdmla_moe.flash_mla import (
    FlashMLASchedMeta,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
)
from tolerance import assert_close

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
Arguments = dict[str, Any]


def there(value: Any, device: torch.device = CUDA) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def dense(dtype: torch.dtype = BF16, batch: int = 3, s_q: int = 2, h_q: int = 16) -> Arguments:
    """Arguments of a call whose requests have 3 pages of 64, the last one not whole."""
    return {
        "q": torch.randn(batch, s_q, h_q, 576).to(dtype),
        "k_cache": torch.randn(3 * batch, 64, 1, 576).to(dtype),
        "block_table": torch.randperm(3 * batch).view(batch, 3).int(),
        "cache_seqlens": torch.arange(150, 150 + batch).int(),
        "head_dim_v": 512,
        "causal": True,
    }


def sparse(row_bytes: int = 584) -> Arguments:
    width = 576 if row_bytes in (656, 352) else 512
    return {
        "q": torch.randn(3, 2, 64, width).to(BF16),
        "k_cache": quantised(row_bytes, 5, 64).cache,
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 512,
        "softmax_scale": 0.01,
        "is_fp8_kvcache": True,
        "indices": torch.randint(-1, 320, (3, 2, 100)).int(),
        "attn_sink": torch.randn(64),
        "topk_length": int32([100, 0, 33]),
    }


def prefill() -> Arguments:
    return {
        "q": torch.randn(5, 16, 576).to(BF16),
        "kv": torch.randn(80, 1, 576).to(BF16),
        "indices": torch.randint(-1, 81, (5, 1, 64)).int(),
        "sm_scale": 0.05,
    }


def decode(**arguments: Any) -> Any:
    plan = arguments.setdefault("tile_scheduler_metadata", FlashMLASchedMeta())
    return (*flash_mla_with_kvcache(**arguments), plan)


def fp8_dense(**more: Tensor) -> Arguments:
    arguments = dense()
    return {**arguments, "k_cache": arguments["k_cache"].to(FP8), "is_fp8_kvcache": True, **more}


RIGHT: dict[str, Callable[[], Arguments]] = {
    "dense": dense,
    "dense float16": lambda: dense(torch.float16),
    "dense float32": lambda: dense(torch.float32, h_q=3),
    "dense FP8 cache": lambda: fp8_dense(descale_k=torch.tensor([0.5])),
    "dense FP8": lambda: {**fp8_dense(descale_q=torch.tensor([0.5])), "q": torch.randn(3, 2, 16, 576).to(FP8)},
    "no request": lambda: dense(batch=0),
    "no position": lambda: dense(s_q=0),
    "V4": sparse,
    "V3.2": lambda: sparse(656),
    "two caches": lambda: (
        sparse()
        | {
            "extra_k_cache": quantised(584, 9, 2, pad=16).cache,
            "extra_indices_in_kvcache": torch.randint(-1, 18, (3, 2, 7)).int(),
            "extra_topk_length": int32([7, 3, 0]),
        }
    ),
    "batch invariant": lambda: dense() | {"enable_batch_invariant": True},
}


@pytest.mark.parametrize("name", RIGHT)
def test_results_and_plans_have_the_same_structure(name: str) -> None:
    arguments = RIGHT[name]()
    *on_cpu, cpu_plan = decode(**arguments)
    *on_gpu, plan = decode(**{key: there(value) for key, value in arguments.items()})
    for what, expected, result in zip(("out", "lse"), on_cpu, on_gpu, strict=True):
        assert result.device == CUDA
        assert (result.dtype, result.shape, result.stride()) == (expected.dtype, expected.shape, expected.stride())
        assert_close(what, result.cpu(), expected.double(), rounded_terms=True)
    assert plan.config == cpu_plan.config
    for one, other in (
        (plan.tile_scheduler_metadata, cpu_plan.tile_scheduler_metadata),
        (plan.num_splits, cpu_plan.num_splits),
    ):
        assert one.device == CUDA
        assert (one.dtype, one.dim(), one.shape[-1]) == (other.dtype, other.dim(), other.shape[-1])
    given = torch.full_like(on_gpu[0], float("nan"))
    out, _, _ = decode(**{key: there(value) for key, value in arguments.items()}, out=given)
    assert out is given
    assert torch.equal(out, on_gpu[0])


def test_prefill_has_the_same_structure() -> None:
    arguments = prefill()
    on_cpu = flash_mla_sparse_fwd(**arguments)
    on_gpu = flash_mla_sparse_fwd(**{name: there(value) for name, value in arguments.items()})
    for expected, result in zip(on_cpu, on_gpu, strict=True):
        assert (result.dtype, result.shape, result.stride()) == (expected.dtype, expected.shape, expected.stride())
        assert_close(
            "result", result.cpu(), expected.double(), rounded_terms=True, scale=2 * float(expected.abs().max())
        )


# What is wrong with a call that is right otherwise, as arguments on the CPU.
WRONG: list[tuple[Callable[[], Arguments], Callable[[Arguments], Arguments]]] = [
    (dense, lambda a: {"q": a["q"][0]}),
    (dense, lambda a: {"q": a["q"].float()[..., :575].contiguous()}),
    (dense, lambda a: {"q": a["q"].int()}),
    (dense, lambda a: {"k_cache": a["k_cache"][:, :, 0]}),
    (dense, lambda a: {"k_cache": a["k_cache"].double()}),
    (dense, lambda a: {"k_cache": a["k_cache"].to(FP8)}),
    (dense, lambda a: {"k_cache": a["k_cache"][:, :0]}),
    (dense, lambda a: {"k_cache": a["k_cache"].expand(-1, -1, 3, -1)}),
    (dense, lambda a: {"k_cache": a["k_cache"].transpose(1, 3).contiguous().transpose(1, 3)}),
    (dense, lambda a: {"block_table": None}),
    (dense, lambda a: {"block_table": a["block_table"].long()}),
    (dense, lambda a: {"block_table": a["block_table"][:2]}),
    (dense, lambda a: {"block_table": a["block_table"].mT.contiguous().mT}),
    (dense, lambda a: {"cache_seqlens": None}),
    (dense, lambda a: {"cache_seqlens": a["cache_seqlens"].long()}),
    (dense, lambda a: {"cache_seqlens": a["cache_seqlens"][None]}),
    (dense, lambda a: {"head_dim_v": 577}),
    (dense, lambda a: {"head_dim_v": -1}),
    (dense, lambda a: {"softmax_scale": float("nan")}),
    (dense, lambda a: {"softmax_scale": float("inf")}),
    (dense, lambda a: {"is_fp8_kvcache": True}),
    (dense, lambda a: {"attn_sink": torch.zeros(16)}),
    (dense, lambda a: {"descale_k": torch.ones(1)}),
    (dense, lambda a: {"descale_q": torch.ones(1)}),
    (dense, lambda a: {"out": torch.zeros(3, 2, 16, 511, dtype=BF16)}),
    (dense, lambda a: {"out": torch.zeros(3, 2, 16, 512)}),
    (dense, lambda a: {"out": torch.zeros(3, 2, 512, 16, dtype=BF16).mT}),
    (dense, lambda a: {"tile_scheduler_metadata": torch.zeros(1, 8)}),
    (fp8_dense, lambda a: {"is_fp8_kvcache": False}),
    (fp8_dense, lambda a: {"descale_k": torch.ones(2)}),
    (fp8_dense, lambda a: {"descale_k": torch.ones(1).double()}),
    (sparse, lambda a: {"causal": True}),
    (sparse, lambda a: {"indices": a["indices"].long()}),
    (sparse, lambda a: {"indices": a["indices"][0]}),
    (sparse, lambda a: {"indices": a["indices"][:2]}),
    (sparse, lambda a: {"attn_sink": torch.zeros(63)}),
    (sparse, lambda a: {"attn_sink": torch.zeros(64).double()}),
    (sparse, lambda a: {"topk_length": int32([1, 2])}),
    (sparse, lambda a: {"topk_length": torch.zeros(3)}),
    (sparse, lambda a: {"extra_k_cache": a["k_cache"]}),
    (sparse, lambda a: {"extra_indices_in_kvcache": a["indices"]}),
    (sparse, lambda a: {"extra_topk_length": a["topk_length"]}),
    (sparse, lambda a: {"k_cache": torch.zeros(5, 64, 1, 583, dtype=torch.uint8)}),
    (sparse, lambda a: {"k_cache": torch.zeros(5, 64, 1, 656, dtype=torch.uint8)}),
    (sparse, lambda a: {"k_cache": torch.zeros(5, 64, 2, 584, dtype=torch.uint8)}),
    (sparse, lambda a: {"q": a["q"].float(), "k_cache": torch.zeros(5, 64, 1, 512).double(), "is_fp8_kvcache": False}),
    (sparse, lambda a: {"is_fp8_kvcache": False}),
    (sparse, lambda a: {"head_dim_v": 513}),
    (sparse, lambda a: {"descale_k": torch.ones(1)}),
    (prefill, lambda a: {"q": a["q"][None]}),
    (prefill, lambda a: {"kv": a["kv"].float()}),
    (prefill, lambda a: {"kv": a["kv"][:, 0]}),
    (prefill, lambda a: {"kv": a["kv"].expand(-1, 3, -1)}),
    (prefill, lambda a: {"indices": a["indices"].long()}),
    (prefill, lambda a: {"indices": a["indices"][:, 0]}),
    (prefill, lambda a: {"indices": a["indices"][:4]}),
    (prefill, lambda a: {"d_v": 577}),
    (prefill, lambda a: {"attn_sink": torch.zeros(15)}),
    (prefill, lambda a: {"topk_length": torch.zeros(5).long()}),
    (prefill, lambda a: {"sm_scale": float("nan")}),
    (prefill, lambda a: {"out": torch.zeros(5, 16, 511, dtype=BF16)}),
]


def refusal(function: Callable[..., Any], arguments: Arguments) -> tuple[type, str]:
    with pytest.raises((ValueError, TypeError, NotImplementedError)) as error:
        function(**arguments)
    return error.type, str(error.value)


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_wrong_calls_are_refused_in_the_same_words(number: int) -> None:
    right, change = WRONG[number]
    arguments = right()
    arguments |= change(arguments)
    function = flash_mla_sparse_fwd if right is prefill else decode
    kind, words = refusal(function, arguments)
    on_gpu = refusal(function, {name: there(value) for name, value in arguments.items()})
    assert (on_gpu[0], on_gpu[1].replace("cuda:0", "cpu")) == (kind, words)


@pytest.mark.parametrize("right", [dense, fp8_dense, sparse, prefill])
def test_one_tensor_on_another_device_is_refused(right: Callable[[], Arguments]) -> None:
    arguments = right()
    function = flash_mla_sparse_fwd if right is prefill else decode
    on_gpu = {name: there(value) for name, value in arguments.items()}
    for name, value in arguments.items():
        if name != "q" and isinstance(value, Tensor):
            assert name in refusal(function, {**on_gpu, name: value})[1]
            assert name in refusal(function, {**arguments, name: on_gpu[name]})[1]
    shape = (*arguments["q"].shape[:-1], 512)
    assert "out" in refusal(function, {**on_gpu, "out": torch.zeros(shape, dtype=BF16)})[1]


# --- plans ---


def same(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(*pair) for pair in zip(left, right, strict=True))


@pytest.mark.parametrize("right", [dense, sparse])
def test_one_plan_serves_all_layers_and_steps(right: Callable[[], Arguments]) -> None:
    """Queries and caches differ from layer to layer, lengths and lists from replay to replay of one graph."""
    layers = [{name: there(value) for name, value in right().items()} for _ in range(3)]
    steps = ["block_table", "cache_seqlens"] if right is dense else ["indices", "topk_length"]
    for layer in layers:
        layer.update({name: layers[0][name] for name in steps})
    plan, _ = get_mla_metadata()
    alone = [decode(**layer)[:2] for layer in layers]
    assert all(
        same(flash_mla_with_kvcache(tile_scheduler_metadata=plan, **layer), expected)
        for layer, expected in zip(layers, alone, strict=True)
    )
    filled = plan.tile_scheduler_metadata
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [flash_mla_with_kvcache(tile_scheduler_metadata=plan, **layer) for layer in layers]
    for _ in range(3):
        other = right()
        if "cache_seqlens" in steps:
            other["cache_seqlens"] = torch.randint(193, (3,)).int()
        for name in steps:
            layers[0][name].copy_(other[name])
        graph.replay()
        for layer, results in zip(layers, captured, strict=True):
            assert same(decode(**layer)[:2], results)
            assert same(flash_mla_with_kvcache(tile_scheduler_metadata=plan, **layer), results)
    assert plan.tile_scheduler_metadata is filled


def test_metadata_is_asked_for_without_a_device() -> None:
    """Nothing of it is made before the first call, whose device it is on then; another device may not take it over."""
    arguments = dense()
    for given in ((), (arguments["cache_seqlens"], 32, 1), (there(arguments["cache_seqlens"]), 32, 1)):
        plan, num_splits = get_mla_metadata(*given)
        assert plan == FlashMLASchedMeta()
        assert num_splits is None
    decode(**{name: there(value) for name, value in arguments.items()}, tile_scheduler_metadata=plan)
    assert plan.num_splits is not None
    assert plan.num_splits.device == CUDA
    on_cpu = decode(**arguments, tile_scheduler_metadata=plan)
    assert same(on_cpu[:2], decode(**arguments)[:2])


# --- several GPUs ---

TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@TWO
@pytest.mark.parametrize("right", [dense, fp8_dense, sparse, prefill])
def test_tensors_of_a_gpu_that_is_not_current(right: Callable[[], Arguments]) -> None:
    arguments, other = right(), torch.device("cuda", 1)
    function = flash_mla_sparse_fwd if right is prefill else decode
    expected = function(**{name: there(value) for name, value in arguments.items()})
    with torch.cuda.device(0), dsm.explain() as choices:
        result = function(**{name: there(value, other) for name, value in arguments.items()})
    assert {choice.implementation for choice in choices} <= {"sm90", "cuda"}
    assert torch.cuda.current_device() == 0
    for one, value in zip(expected[:2], result[:2], strict=True):
        assert value.device == other
        assert torch.equal(one.cpu(), value.cpu())
    for name, value in arguments.items():
        if name != "q" and isinstance(value, Tensor):
            mixed = {key: there(entry, CUDA if key == name else other) for key, entry in arguments.items()}
            assert f"{name} must be on cuda:1" in refusal(function, mixed)[1]
