# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The self-test: every operator on small inputs against its formula in float64."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from . import _library
from .accuracy import Deviation
from .cases import CASES, Case, Trial
from .choices import explain

__all__ = ["OperatorReport", "devices", "run"]

TIMED_CALLS = 5


@dataclass(frozen=True)
class OperatorReport:
    """How one operator did for one dtype: the worst of its cases.

    ``max_error`` is the error of the worst element and ``tolerance`` what is allowed there, both relative to the
    largest magnitude of the result; ``time_ms`` is that case's median call. ``note`` says what went wrong.
    """

    operator: str
    implementation: str
    dtype: str
    max_error: float
    tolerance: float
    time_ms: float
    ok: bool
    device: str = "cpu"
    note: str = ""


def devices() -> list[torch.device]:
    """The CPU, and the current GPU where there is one."""
    gpu = [torch.device("cuda", torch.cuda.current_device())] if torch.cuda.is_available() else []
    return [torch.device("cpu"), *gpu]


def run(device: torch.device | str | None = None, *, cases: Iterable[Case] | None = None) -> list[OperatorReport]:
    """Tests every operator of the registry, forward and backward, in every dtype it takes.

    An operator that no case runs is reported as failed. On a GPU only the operators that have an implementation for it
    in this build are tested.

    Args:
        device: where; by default on the CPU and on the GPU if there is one.
        cases: by default all of :data:`ds_flashdmla_moe.cases.CASES`.
    """
    places = devices() if device is None else [torch.device(device)]
    chosen = CASES if cases is None else tuple(cases)
    reports = [report for place in places for report in _reports_on(place, chosen)]
    if cases is None:
        covered = {name for case in CASES for name in case.operators}
        reports += [
            OperatorReport(name, "none", "none", math.inf, 0.0, 0.0, False, note="no case runs this operator")
            for entry in _library.operators()
            if (name := entry["name"]) not in covered
        ]
    return sorted(reports, key=lambda report: report.operator)


def _reports_on(device: torch.device, cases: tuple[Case, ...]) -> list[OperatorReport]:
    """One report per operator and dtype: the worst of its cases."""
    built = {
        entry["name"]
        for entry in _library.operators()
        if any(row["built"] and (row["name"] == "cpu") == (device.type == "cpu") for row in entry["implementations"])
    }
    worst: dict[tuple[str, str], OperatorReport] = {}
    for case in (case for case in cases if case.operator in built):
        for dtype in case.dtypes:
            trial = Trial(case, dtype, device)
            found = [_examine(case.operator, trial, trial.forward, trial.forward_deviation)]
            if case.gradients and built.issuperset(case.operators):
                found.append(_examine(case.backward_operator, trial, trial.backward, trial.backward_deviation))
            for report in found:
                key = report.operator, report.dtype
                worst[key] = max(worst.get(key, report), report, key=_badness)
    return list(worst.values())


def _badness(report: OperatorReport) -> tuple[bool, float]:
    return not report.ok, report.max_error / (report.tolerance or 1.0)


def _examine(
    operator: str, trial: Trial, call: Callable[[], object], measure: Callable[[], Deviation]
) -> OperatorReport:
    label, failure = trial.case.label, ""
    error, milliseconds = Deviation(math.inf, 0.0), 0.0
    with explain() as choices:
        try:
            call()  # also warms up
            error = measure()
            milliseconds = _median_ms(call, trial.device)
        except (ValueError, RuntimeError, NotImplementedError) as problem:
            failure = " ".join(str(problem).split())
    choice = choices.of(operator)
    if not failure and choice is None:
        failure = f"the case never called {operator}"
    if not failure and not error.ratio <= 1:
        failure = f"{error.ratio:.3g} times the allowed error"
    return OperatorReport(
        operator=operator,
        implementation=choice.implementation if choice else "none",
        dtype=str(trial.dtype).removeprefix("torch."),
        max_error=error.error,
        tolerance=error.allowed,
        time_ms=milliseconds,
        ok=not failure,
        device=trial.device.type,
        note=f"{label}: {failure}" if failure and label else failure,
    )


def _median_ms(call: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(TIMED_CALLS):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)
