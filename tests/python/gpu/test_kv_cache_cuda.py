# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The caches on CUDA have the bytes that the CPU gives them, whatever the slots, the pages and the addresses."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ds_flashdmla_moe as dsm
from tolerance import FLOATING, assert_close

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
MLA_FORMATS, V4_FORMATS, INDEXER = (656, 352), (584, 528, 288), 132
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1

Insert = Callable[[Tensor, Tensor], None]  # cache, slots


class Buffer:
    """Memory of 0xFF bytes, NaN in every format, and a cache in it that begins at `offset`, with `padding` a page."""

    def __init__(self, device: torch.device, pages: int, page_size: int, size: int, padding: int, offset: int) -> None:
        stride = page_size * size + padding
        self.bytes = torch.full((offset + pages * stride,), 255, dtype=torch.uint8, device=device)
        self.cache = self.bytes.as_strided((pages, page_size, 1, size), (stride, size, size, 1), offset)


# Pages that 16-byte accesses suit, and others.
PAGES = [(5, 64, 0, 0), (7, 9, 576, 0), (40, 1, 0, 0), (6, 3, 0, 16), (5, 4, 100, 0), (5, 8, 0, 3), (1, 50, 0, 0)]


def spread(tokens: int, width: int, dtype: torch.dtype) -> Tensor:
    """Values of all magnitudes, groups of zeros, ties between codes, NaN and infinities in the last rows."""
    x = torch.randn(tokens, width) * torch.exp2(torch.arange(width) // 8 % 40 - 20.0)
    x[:, 128:192] = 0
    x[1::3] = (torch.randint(-64, 65, x.shape) / 4)[1::3]
    x[0, :8] = torch.tensor([-0.0, 448, -449, 1e30, 1e-30, 2**-10, 3 * 2**-10, 465])
    x[-1, 7], x[-1, 40], x[-2, 9], x[-3, 500 % width] = math.nan, -math.nan, math.inf, -math.inf
    return x.to(dtype)


def hostile_slots(tokens: int, rows: int) -> Tensor:
    """Rows several times each, -1, and numbers that are no rows."""
    slots = torch.randint(rows, (tokens,))
    slots[::5] = -1
    bad = torch.tensor([rows, INT64_MAX, INT64_MIN, 2**31, 2**32, -2, 2**31 + 1])[: tokens // 8]
    slots[1 : 1 + 8 * len(bad) : 8] = bad
    return slots


def assert_same_bytes(insert: Callable[[torch.device], Insert], size: int, tokens: int) -> None:
    """Inserts on both devices, into pages of every kind."""
    for pages, page_size, padding, offset in PAGES:
        slots = hostile_slots(tokens, pages * page_size)
        results = []
        for device in (CPU, CUDA):
            buffer = Buffer(device, pages, page_size, size, padding, offset)
            insert(device)(buffer.cache, slots.to(device))
            results.append(buffer.bytes.cpu())
        wrong = (results[0] != results[1]).nonzero().flatten()
        assert len(wrong) == 0, f"{pages} x {page_size} + {padding}: {len(wrong)} bytes, first at {wrong[:4].tolist()}"


@pytest.mark.parametrize("tokens", [1, 9, 77, 512, 513, 5000])
@pytest.mark.parametrize("scale_format", ["ue8m0", "fp32"])
@pytest.mark.parametrize("size", MLA_FORMATS)
def test_mla_kv_insert(size: int, scale_format: str, tokens: int) -> None:
    latent, k_pe = spread(max(tokens, 3), 512, torch.bfloat16), spread(max(tokens, 3), 64, torch.bfloat16)

    def on(device: torch.device) -> Insert:
        x, y = latent[-tokens:].to(device), k_pe[-tokens:].to(device)
        return lambda cache, slots: dsm.ops.mla_kv_insert(x, y, cache, slots, scale_format)

    assert_same_bytes(on, size, tokens)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("size", MLA_FORMATS)
@pytest.mark.parametrize("shift", [0, 1])
def test_mla_kv_insert_from_every_dtype_and_address(size: int, dtype: torch.dtype, shift: int) -> None:
    rows = torch.nn.functional.pad(spread(50, 576, dtype), (shift, 0))

    def on(device: torch.device) -> Insert:
        x = rows.to(device)[:, shift:]
        return lambda cache, slots: dsm.ops.mla_kv_insert(x[:, :512], x[:, 512:], cache, slots, "fp32")

    assert_same_bytes(on, size, 50)


@pytest.mark.parametrize("tokens", [1, 9, 77, 512, 513, 5000])
@pytest.mark.parametrize("size", V4_FORMATS)
def test_v4_kv_insert(size: int, tokens: int) -> None:
    rows = spread(max(tokens, 3), 512, torch.bfloat16)[-tokens:]

    def on(device: torch.device) -> Insert:
        x = rows.to(device)
        return lambda cache, slots: dsm.ops.v4_kv_insert(x, cache, slots)

    assert_same_bytes(on, size, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", V4_FORMATS)
@pytest.mark.parametrize("weighted", ["none", "same", "float32"])
@pytest.mark.parametrize(("pairs", "shift"), [(None, 0), (32, 0), (32, 1), (33, 0), (256, 0), (0, 1)])
def test_v4_kv_insert_normalised_and_turned(
    size: int, dtype: torch.dtype, weighted: str, pairs: int | None, shift: int
) -> None:
    tokens = 300
    rows = torch.nn.functional.pad(torch.randn(tokens, 512).to(dtype), (shift, 0))
    weight = None if weighted == "none" else torch.randn(512 + shift).to(dtype if weighted == "same" else torch.float32)
    positions = torch.randint(-1_000_000, 1_000_000, (tokens,))
    positions[:4] = torch.tensor([0, 1, 2**31 - 1, 1_048_576])

    def on(device: torch.device) -> Insert:
        inv_freq = None if pairs is None else dsm.ops.rope_frequencies(2 * pairs).to(device)
        return lambda cache, slots: dsm.ops.v4_kv_insert(
            rows.to(device)[:, shift:],
            cache,
            slots,
            None if weight is None else weight.to(device)[shift:],
            1e-6,
            None if pairs is None else positions.to(device),
            inv_freq,
        )

    assert_same_bytes(on, size, tokens)


@pytest.mark.parametrize("cache_dtype", FLOATING, ids=str)
@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("width", [512, 45, 7])
def test_plain_caches(width: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    """With duplicate and bad slots; double angles may differ in their last bit."""
    tokens, pages, page_size = 90, 4, 9
    rows, weight = 3 * torch.randn(tokens, width).to(dtype), torch.randn(width).to(dtype)
    slots, positions = hostile_slots(tokens, pages * page_size), torch.arange(tokens) * 999
    start = (width + 1) // 2
    caches = []
    for device in (CPU, CUDA):
        x, at = rows.to(device), slots.to(device)
        turn = positions.to(device), dsm.ops.rope_frequencies(2 * (width // 5)).to(device)
        caches.append(
            made := [torch.full((pages, page_size + 1, 1, width), 7.0, dtype=cache_dtype, device=device)[:, 1:]]
        )
        made += [made[0].clone() for _ in range(2)]
        dsm.ops.mla_kv_insert(x[:, :start], x[:, start:], made[0], at)
        dsm.ops.v4_kv_insert(x, made[1], at, weight.to(device))
        dsm.ops.v4_kv_insert(x, made[2], at, weight.to(device), 1e-6, *turn)
    for i, (on_cpu, on_gpu) in enumerate(zip(*caches, strict=True)):
        if i == 2 and dtype == torch.float64:
            assert_close("turned", on_gpu.cpu(), on_cpu.double())
        else:
            assert torch.equal(on_cpu, on_gpu.cpu())


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("d", [1, 8, 33, 128, 700])
@pytest.mark.parametrize("tokens", [1, 77, 513, 5000])
def test_indexer_k_insert(d: int, dtype: torch.dtype, tokens: int) -> None:
    keys = spread(max(tokens, 3), max(d, 41), dtype)[-tokens:, -d:]

    def on(device: torch.device) -> Insert:
        k = keys.to(device)
        return lambda cache, slots: dsm.ops.indexer_k_insert(k, cache, slots)

    assert_same_bytes(on, d + 4, tokens)


@pytest.mark.parametrize(
    ("size", "scale_format"), [(656, "fp32"), *((size, "ue8m0") for size in (*MLA_FORMATS, *V4_FORMATS, INDEXER))]
)
def test_many_tokens_at_once_as_a_few_at_a_time(size: int, scale_format: str) -> None:
    """Warps then have many rows, of which they fetch some ahead."""
    tokens, pages = 270_011, 4300
    rows = spread(5000, 576, torch.bfloat16).to(CUDA)[torch.randint(5000, (tokens,), device=CUDA)]
    slots = torch.randperm(pages * 64, device=CUDA)[:tokens]
    slots[::7] = slots[5000:6000] = -1

    def insert(cache: Tensor, some: slice) -> None:
        x, at = rows[some], slots[some]
        if size == INDEXER:
            dsm.ops.indexer_k_insert(x[:, :128], cache, at)
        elif size in MLA_FORMATS:
            dsm.ops.mla_kv_insert(x[:, :512], x[:, 512:], cache, at, scale_format)
        else:
            dsm.ops.v4_kv_insert(x[:, :512], cache, at)

    at_once, bit_by_bit = (torch.zeros(pages, 64, 1, size, dtype=torch.uint8, device=CUDA) for _ in range(2))
    insert(at_once, slice(None))
    for first in range(0, tokens, 500):
        insert(bit_by_bit, slice(first, first + 500))
    assert torch.equal(at_once, bit_by_bit)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("size", [*MLA_FORMATS, *V4_FORMATS])
@pytest.mark.parametrize("pages", PAGES, ids=str)
def test_kv_gather(size: int, pages: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """All codes, NaN among them, and scales; indices that are no rows give zeros."""
    buffer = Buffer(CPU, pages[0], pages[1], size, *pages[2:])
    buffer.bytes.copy_(torch.randint(256, buffer.bytes.shape))
    rows = pages[0] * pages[1]
    for count in (0, 1, 15, 16, 333):
        indices = torch.randint(rows, (count,), dtype=torch.int32)
        bad = torch.tensor([-1, rows, INT32_MIN, INT32_MAX, rows + 1], dtype=torch.int32)[:count]
        indices[: len(bad)] = bad
        on_cpu = dsm.ops.kv_gather(buffer.cache, indices, dtype)
        moved = Buffer(CUDA, pages[0], pages[1], size, *pages[2:])
        moved.bytes.copy_(buffer.bytes)
        on_gpu = dsm.ops.kv_gather(moved.cache, indices.to(CUDA), dtype).cpu()
        assert not on_gpu[: len(bad)].any()
        torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("cache_dtype", FLOATING, ids=str)
@pytest.mark.parametrize("width", [1, 7, 24, 576, 5000])
def test_kv_gather_of_plain_caches(width: int, cache_dtype: torch.dtype, dtype: torch.dtype) -> None:
    cache = torch.randn(5, 8, 1, width).to(cache_dtype)
    indices = torch.tensor([39, 0, -1, 40, 7, 7, INT32_MIN, INT32_MAX, *range(40)], dtype=torch.int32)
    expected = dsm.ops.kv_gather(cache, indices, dtype)
    for first in (0, 3):  # pages apart, and beginning off alignment
        moved = torch.full((5, 12, 1, width), math.nan, dtype=cache_dtype, device=CUDA)[:, first : first + 8]
        moved.copy_(cache)
        assert torch.equal(dsm.ops.kv_gather(moved, indices.to(CUDA), dtype).cpu(), expected)
    empty = dsm.ops.kv_gather(moved[:0], indices.to(CUDA), dtype)
    assert empty.shape == (len(indices), width)
    assert not empty.any()


def test_the_last_of_many_tokens_with_one_slot() -> None:
    for tokens in (8, 100, 512, 513, 100_000):
        latent = torch.arange(tokens, device=CUDA).float()[:, None]
        cache = torch.full((1, 3, 1, 2), -1.0, device=CUDA)
        dsm.ops.mla_kv_insert(latent, latent, cache, torch.ones(tokens, dtype=torch.int64, device=CUDA))
        assert cache.flatten().tolist() == [-1, -1, tokens - 1, tokens - 1, -1, -1]


def test_empty_problems_change_nothing() -> None:
    for size in (*MLA_FORMATS, *V4_FORMATS):
        buffer = Buffer(CUDA, 2, 3, size, 0, 0)
        no_slots = torch.zeros(0, dtype=torch.int64, device=CUDA)
        x = torch.zeros(0, 576 if size in MLA_FORMATS else 512, device=CUDA)
        if size in MLA_FORMATS:
            dsm.ops.mla_kv_insert(x[:, :512], x[:, 512:], buffer.cache, no_slots)
        else:
            dsm.ops.v4_kv_insert(x, buffer.cache, no_slots, torch.ones(512, device=CUDA))
            dsm.ops.v4_kv_insert(torch.zeros(2, 512, device=CUDA), buffer.cache[:0], no_slots.new_zeros(2))
        assert (buffer.bytes == 255).all()


@pytest.mark.parametrize("tokens", [64, 4096])
def test_graph_replays_with_changed_slots_and_indices(tokens: int) -> None:
    pages, page_size = 80, 64
    weight, inv_freq = torch.randn(512, device=CUDA), dsm.ops.rope_frequencies(64).to(CUDA)
    kv, keys = torch.randn(tokens, 512, device=CUDA).bfloat16(), torch.randn(tokens, 128, device=CUDA).bfloat16()
    slots, positions = torch.zeros(2, tokens, dtype=torch.int64, device=CUDA).unbind()
    indices = torch.zeros(tokens, dtype=torch.int32, device=CUDA)
    caches = [torch.zeros(pages, page_size, 1, size, dtype=torch.uint8, device=CUDA) for size in (584, 656, INDEXER)]

    def run() -> Tensor:
        dsm.ops.v4_kv_insert(kv, caches[0], slots, weight, 1e-6, positions, inv_freq)
        dsm.ops.mla_kv_insert(kv, kv[:, :64], caches[1], slots)
        dsm.ops.indexer_k_insert(keys, caches[2], slots)
        return dsm.ops.kv_gather(caches[0], indices, torch.bfloat16)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gathered = run()
    for _ in range(3):
        slots.copy_(hostile_slots(tokens, pages * page_size))
        positions.copy_(torch.randint(100_000, (tokens,)))
        indices.copy_(torch.randint(-1, pages * page_size, (tokens,)))
        kv.copy_(torch.randn(tokens, 512))
        replayed = []
        for replay in (True, False):
            for cache in caches:
                cache.fill_(3)
            out = gathered if replay else run()
            if replay:
                graph.replay()
            torch.cuda.synchronize()
            replayed.append([result.clone() for result in (out, *caches)])
        assert all(torch.equal(*pair) for pair in zip(*replayed, strict=True))


def test_offsets_beyond_two_to_the_31() -> None:
    if torch.cuda.mem_get_info(CUDA)[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    page_size, rows = 64, torch.randn(3, 512, device=CUDA).bfloat16()
    pages = 2**32 // (584 * page_size) + 5
    cache = torch.zeros(pages, page_size, 1, 584, dtype=torch.uint8, device=CUDA)
    slots = torch.tensor([0, pages * page_size - 1, pages * page_size // 2], device=CUDA)
    near = torch.zeros(1, 3, 1, 584, dtype=torch.uint8, device=CUDA)
    dsm.ops.v4_kv_insert(rows, cache, slots)
    dsm.ops.v4_kv_insert(rows, near, torch.arange(3, device=CUDA))
    expected = dsm.ops.kv_gather(near, torch.arange(3, device=CUDA).int())
    assert torch.equal(dsm.ops.kv_gather(cache, slots.int()), expected)
