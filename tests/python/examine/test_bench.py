# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ds_flashdmla_moe import flash_mla
from ds_flashdmla_moe.accuracy import deviation
from ds_flashdmla_moe.bench import Limits, Row, limits, measurements, timing
from ds_flashdmla_moe.bench.output import duration, save_json, save_plot, table
from ds_flashdmla_moe.cases import CASES, Case, Trial, Work, flash_mla_peer
from ds_flashdmla_moe.quant import QTensor

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Limits:
    monkeypatch.setattr(limits, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(limits, "MATRIX_SIZE", {"cpu": 64})
    return Limits(CPU, seconds=0.0)


def test_calls_take_turns_and_are_warmed_up() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = timing.take_turns(calls, CPU, seconds=0.0)
    assert timings.keys() == {"a", "b", "c"}
    assert all(t.device > 0 for t in timings.values())
    rounds = order[(timing.WARM_UP_CALLS + 1) * 3 :]
    assert "".join(rounds).startswith("abccbaabc")
    assert Counter(rounds) == dict.fromkeys("abc", timing.MIN_ROUNDS)


def test_the_median_is_of_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    assert timing.take_turns({"a": lambda: None, "b": lambda: next(clock)}, CPU, 0.0) == {"a": (1, 1), "b": (2, 2)}


def test_least_time_is_the_larger_of_bytes_and_operations(quick: Limits) -> None:
    assert quick.least_seconds(Work(0, quick.bandwidth()), torch.float32) == pytest.approx(1)
    assert quick.least_seconds(Work(2 * quick.matmul(torch.float32), 1), torch.float32) == pytest.approx(2)
    assert quick.as_dict().keys() == {"copy GB/s", "matmul float32 GFLOP/s"}


@pytest.mark.parametrize("case", [case for case in CASES if case.benchmark], ids=lambda c: f"{c.operator} {c.label}")
def test_what_is_compared_computes_the_same(case: Case) -> None:
    # As in the benchmark, dense attention has as many queries as keys (or one), and rope rotates all of a head.
    dense = case.operator in ("flash_attn", "flash_dmla")
    equal = {"s_kv": "s_q" if dense else "s_kv", "d_rope": "d"}
    sizes = {name: case.sizes[equal.get(name, name)] for name in case.sizes}
    trial = Trial(case, torch.float32, CPU, sizes)
    ours = trial.forward()[0]
    peers = case.peers("cpu")
    assert peers
    for name, function in peers.items():
        theirs = trial.of(function).forward()[0]
        expected = ours[: theirs.shape[0]].double()  # a composition may leave out the unused rows at the end
        assert ours[theirs.shape[0] :].count_nonzero() == 0
        assert deviation(theirs, expected).ratio <= 1, name


@pytest.mark.parametrize("case", [case for case in CASES if case.benchmark], ids=lambda c: f"{c.operator} {c.label}")
def test_work_counts_at_least_what_is_touched(case: Case) -> None:
    """Bytes of the forward pass are those of its inputs and outputs, but for small index tensors."""
    assert case.work
    trial = Trial(case, torch.float32, CPU)
    values = [*trial.inputs.values(), *trial.forward()]
    values += [part for value in values if isinstance(value, QTensor) for part in vars(value).values()]
    tensors = [t for t in values if isinstance(t, torch.Tensor)]
    touched = sum(t.numel() * t.element_size() for t in tensors)
    counted = case.work(case.sizes, 4).bytes
    print(f"{case.operator}: {counted} bytes counted, {touched} in tensors")
    assert 0.5 * touched <= counted <= 1.2 * touched


def test_a_row_is_measured(quick: Limits, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.operator == "rms_norm")
    case = replace(case, benchmark={"cpu": ({"rows": 16, "hidden": 64},)})
    jobs = list(measurements([case], [], quick, [torch.float32, torch.bfloat16], 0.0))
    assert [title for title, _ in jobs] == 2 * ["rms_norm rows=16 hidden=64", "rms_norm_backward rows=16 hidden=64"]
    rows = [job() for _, job in jobs]
    for row in rows:
        assert row.implementation == "cpu"
        assert row.peers.keys() == {"torch"}
        assert 0 < row.error <= row.tolerance
        assert row.worst_errors.keys() == ({"dsm", "torch"} if row.operator == "rms_norm" else set())
        assert row.worst_errors.keys() == row.rms_errors.keys()
        assert row.limit_ms == pytest.approx(row.of_limit * row.time_ms)
        assert row.gbytes * row.time_ms == pytest.approx(
            1e-6 * (2 if row.operator == "rms_norm" else 3) * 16 * 64 * (4 if row.dtype == "float32" else 2)
        )
        assert row.relative_to("torch") == pytest.approx(row.time_ms / row.peers["torch"])
    assert not list(measurements([case], [], quick, [torch.float32], 0.0, peers=["apex"]))
    more = replace(case, peers=lambda device: {**case.peers(device), "other": next(iter(case.peers(device).values()))})
    (_, job), *_ = measurements([more], [], quick, [torch.float32], 0.0, peers=["other"])
    assert job().peers.keys() == {"other"}
    (only, _), *others = measurements([case], ["rms_norm_backward"], quick, [torch.float32], 0.0)
    assert only.startswith("rms_norm_backward")
    assert not others

    save_json(tmp_path / "rows.json", rows, quick.as_dict(), {"torch": "x"})
    stored = json.loads((tmp_path / "rows.json").read_text())
    assert [Row(**entry) for entry in stored["rows"]] == rows
    assert stored["limits"]["copy GB/s"] > 0
    for suffix, magic in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        save_plot(tmp_path / f"rows.{suffix}", rows)
        assert (tmp_path / f"rows.{suffix}").read_bytes().startswith(magic)
    assert table(rows, quick.as_dict()).row_count == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.json", "rows.pdf", "rows.png", "rows.svg"]


@pytest.fixture
def flash_mla_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's functions of FlashMLA's names stand for FlashMLA."""
    monkeypatch.setattr(flash_mla_peer, "installed", lambda: flash_mla)


SERVING = [case for case in CASES if case.replayed]
# FlashMLA has no function for two caches that are not quantised.
BESIDE_FLASH_MLA = [case for case in SERVING if case.label != "plain bfloat16 caches"]


@pytest.mark.usefixtures("flash_mla_installed")
@pytest.mark.parametrize("heads", [3, 64, 65])
@pytest.mark.parametrize("case", BESIDE_FLASH_MLA, ids=lambda c: f"{c.operator} {c.label}")
def test_flash_mla_gets_the_same_inputs(case: Case, heads: int) -> None:
    trial = Trial(case, torch.bfloat16, CPU, {**case.sizes, "h_q": heads})
    truth = trial.truth()
    assert trial.forward_deviation(truth).ratio <= 1
    peers = case.peers("cuda")
    assert "FlashMLA" in peers
    for peer in peers.values():
        theirs = trial.of(peer)
        for _ in range(2):  # what the first call keeps serves the second
            assert theirs.forward_deviation(truth).ratio <= 1


@pytest.mark.parametrize("case", SERVING, ids=lambda c: f"{c.operator} {c.label}")
def test_a_sample_of_large_inputs_is_compared(case: Case) -> None:
    sizes = {**case.sizes, ("batch" if "batch" in case.sizes else "s_q"): 33}
    trial = Trial(case, torch.bfloat16, CPU, sizes)
    truth = trial.truth()
    assert {0, 32} < set(truth.entries.tolist())
    assert len(truth.values[0]) == len(truth.entries) < 33
    assert trial.forward_deviation(truth).ratio <= 1

    def wrong_at_the_end(**inputs: object) -> tuple[torch.Tensor, ...]:
        outputs = case.run(**inputs)
        outputs[0][-1] += 1
        return tuple(outputs)

    assert trial.of(wrong_at_the_end).forward_deviation(truth).ratio > 1


@pytest.mark.parametrize("case", SERVING, ids=lambda c: f"{c.operator} {c.label}")
def test_every_query_has_its_own_rows_once(case: Case) -> None:
    inputs = Trial(case, torch.bfloat16, CPU, {**case.sizes, "s_q": 1}).inputs
    for name in {"block_table", "indices", "extra_indices"} & inputs.keys():
        rows = inputs[name].flatten()
        assert rows.unique().numel() == rows.numel(), name
        assert rows.min() >= 0


def test_flash_mla_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(flash_mla_peer, "_MODULES", ("no_such_package.interface", "json"))
    flash_mla_peer.installed.cache_clear()
    assert SERVING[0].peers("cuda") == {}
    monkeypatch.setattr(flash_mla_peer, "_MODULES", ("no_such_package.interface", "ds_flashdmla_moe.flash_mla"))
    flash_mla_peer.installed.cache_clear()
    assert SERVING[0].peers("cuda").keys() == {"FlashMLA"}
    flash_mla_peer.installed.cache_clear()


def test_sizes_that_rows_share_are_said_once(quick: Limits) -> None:
    case = next(case for case in CASES if case.operator == "rms_norm")
    case = replace(case, label="norm", benchmark={"cpu": ({"rows": 3, "hidden": 64}, {"rows": 5, "hidden": 64})})
    rows = [job() for _, job in measurements([case], ["rms_norm"], quick, [torch.float32], 0.0)]
    (sizes, implementations, times, *_) = table(rows, quick.as_dict()).columns
    assert list(sizes.cells) == ["rms_norm, float32, norm, hidden=64\nrows=3", "rows=5"]
    assert list(implementations.cells) == ["cpu\ntorch", "cpu\ntorch"]
    assert [len(str(cell).splitlines()) for cell in times.cells] == [2, 2]
    (alone,) = table(rows[:1], quick.as_dict()).columns[0].cells
    assert alone == "rms_norm, float32, norm\nrows=3 hidden=64"


def test_durations_are_read_easily() -> None:
    assert [duration(ms) for ms in (4711, 12.345, 1, 0.5, 0.0123)] == ["4.71 s", "12.3 ms", "1 ms", "500 µs", "12.3 µs"]
