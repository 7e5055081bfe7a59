# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_flashdmla_moe import _library, cases, doctor
from ds_flashdmla_moe.cases import CASES, Case

RMS_NORM = next(case for case in CASES if case.operator == "rms_norm")


def test_every_operator_passes_in_every_dtype() -> None:
    reports = doctor.run("cpu")
    for report in reports:
        print(f"{report.operator} {report.dtype}: {report.max_error:.2e}, allowed {report.tolerance:.2e} {report.note}")
    assert [report for report in reports if not report.ok] == []
    assert {report.operator for report in reports} == {entry["name"] for entry in _library.operators()}
    for case in CASES:
        for operator in case.operators:
            tested = {report.dtype for report in reports if report.operator == operator}
            assert {str(dtype).removeprefix("torch.") for dtype in case.dtypes} <= tested
    assert all(report.time_ms > 0 and report.implementation == "cpu" for report in reports)


def failures(case: Case) -> dict[str, str]:
    reports = doctor.run("cpu", cases=[replace(case, dtypes=(torch.float32,))])
    return {report.operator: report.note for report in reports if not report.ok}


def test_a_wrong_forward_result_fails_and_its_gradient_with_it() -> None:
    def wrong(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return RMS_NORM.formula(x, weight, eps) * (1 + 1e-4)

    found = failures(replace(RMS_NORM, formula=wrong))
    assert found.keys() == {"rms_norm", "rms_norm_backward"}
    assert "times the allowed error" in found["rms_norm"]


def test_a_wrong_gradient_alone_fails() -> None:
    def detached(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt().detach() * weight

    assert failures(replace(RMS_NORM, formula=detached)).keys() == {"rms_norm_backward"}


def test_one_case_of_several_fails_the_operator() -> None:
    wrong = replace(RMS_NORM, label="doubled", formula=lambda **inputs: 2 * RMS_NORM.formula(**inputs))
    reports = doctor.run("cpu", cases=[RMS_NORM, wrong, RMS_NORM])
    assert {report.ok for report in reports} == {False}
    assert all(report.note.startswith("doubled: ") for report in reports)
    assert len(reports) == 2 * len(RMS_NORM.dtypes)


def test_a_refusal_is_reported_not_raised() -> None:
    def misuse(x: Tensor, weight: Tensor, eps: float) -> Any:
        return RMS_NORM.run(x, weight[1:], eps)

    found = failures(replace(RMS_NORM, run=misuse))
    assert "weight must be [hidden]" in found["rms_norm"]


def test_a_case_that_calls_another_operator_fails() -> None:
    found = failures(replace(RMS_NORM, run=RMS_NORM.formula))
    assert found["rms_norm"] == "the case never called rms_norm"


def test_an_operator_without_a_case_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CASES", tuple(case for case in CASES if case.operator == "rms_norm"))
    failed = {report.operator: report.note for report in doctor.run("cpu") if not report.ok}
    assert failed["swiglu_backward"] == "no case runs this operator"
    assert "rms_norm" not in failed


def test_cases_are_found_by_name() -> None:
    assert {case.operator for case in cases.cases_of(["rms_norm_backward", "swiglu"])} == {"rms_norm", "swiglu"}
    assert cases.cases_of([]) == list(CASES)
    with pytest.raises(ValueError, match="no such operator: rms_nrom"):
        cases.cases_of(["rms_nrom"])
