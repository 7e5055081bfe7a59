# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ds_flashdmla_moe import _library, cases, cli, doctor, flash_mla
from ds_flashdmla_moe.bench import limits
from ds_flashdmla_moe.cases import CASES

RMS_NORM = next(case for case in CASES if case.operator == "rms_norm")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One operator, small sizes."""
    case = replace(RMS_NORM, benchmark={"cpu": ({"rows": 16, "hidden": 64},)})
    monkeypatch.setattr(cases, "CASES", (case,))
    monkeypatch.setattr(limits, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(limits, "MATRIX_SIZE", {"cpu": 64})


def dsm(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Exit status of the command."""
    monkeypatch.setattr(sys, "argv", ["dsm", *words])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    return int(exit_info.value.code or 0)


def test_env(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert dsm(monkeypatch, "env") == 0
    assert str(_library.PATH) in capsys.readouterr().out.replace("\n", "")
    assert dsm(monkeypatch, "env", "--json") == 0
    assert json.loads(capsys.readouterr().out)["library"] == str(_library.PATH)


def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert dsm(monkeypatch, "doctor", "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert "moe_ffn_backward" in out
    assert ", 0 failed" in out


def test_doctor_fails_honestly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = replace(RMS_NORM, formula=lambda **inputs: 1.01 * RMS_NORM.formula(**inputs))
    monkeypatch.setattr(doctor, "CASES", (wrong, *(case for case in CASES if case is not RMS_NORM)))
    assert dsm(monkeypatch, "doctor", "--device", "cpu") == 1
    captured = capsys.readouterr()
    assert "FAIL" in captured.out
    assert "rms_norm float32 on cpu: " in captured.err
    assert "swiglu" not in captured.err


def test_explain(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("explain", "rms_norm_backward", "--device", "cpu", "--dtype", "bfloat16", "--size", "hidden=33")
    assert dsm(monkeypatch, *words) == 0
    out = capsys.readouterr().out
    assert "hidden=33" in out
    assert "bfloat16" in out
    assert "rms_norm " not in out
    assert dsm(monkeypatch, "explain", "--device", "cpu") == 0
    assert "moe_gate_backward" in capsys.readouterr().out


def test_explain_of_a_request_that_none_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.ops.dsm.force_implementation("rms_norm", "cuda")
    try:
        assert dsm(monkeypatch, "explain", "rms_norm_backward", "rms_norm", "--device", "cpu") == 1
    finally:
        torch.ops.dsm.force_implementation("rms_norm", "")
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("none") == 2  # the backward operator is not reached
    assert "another" in out


def test_bench(
    small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    files = ("--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png"))
    assert dsm(monkeypatch, "bench", "rms_norm", "--device", "cpu", "--seconds", "0", *files) == 0
    out = capsys.readouterr().out
    assert "rows=16 hidden=64" in out
    assert "torch" in out
    assert len(json.loads((tmp_path / "b.json").read_text())["rows"]) == 1
    assert (tmp_path / "b.png").stat().st_size > 1000


@pytest.mark.parametrize("operator", ["mla_decode", "sparse_mla_decode", "sparse_mla_prefill"])
def test_bench_beside_flash_mla(
    operator: str, small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    serving = [case for case in CASES if case.replayed and case.operator == operator]
    monkeypatch.setattr(cases.flash_mla_peer, "installed", lambda: flash_mla)
    monkeypatch.setattr(
        cases,
        "CASES",
        tuple(
            replace(case, benchmark={"cpu": (case.sizes,)}, peers=lambda _, case=case: case.peers("cuda"))
            for case in serving
        ),
    )
    files = ("--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "b.png"))
    words = ("bench", operator, "--device", "cpu", "--dtype", "bfloat16", "--seconds", "0", *files)
    assert dsm(monkeypatch, *words) == 0
    out = capsys.readouterr().out
    assert all(case.label.split()[0] in out for case in serving)
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert len(rows) == len(serving)
    beside = [row for row in rows if row["label"] != "plain bfloat16 caches"]  # FlashMLA takes one of them
    for row in beside:
        assert row["peers"].keys() - {"sparse_mla_prefill"} == {"FlashMLA"}
        assert row["worst_errors"]["dsm"] == row["worst_errors"]["FlashMLA"] > row["rms_errors"]["dsm"] > 0
    assert (tmp_path / "b.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("explain rms_nrom", "no such operator: rms_nrom"),
        ("explain --dtype int8", "--dtype must be one of float64, float32, float16, bfloat16, got 'int8'"),
        ("explain --device tpu", "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        ("explain rms_norm --size foo=3", "--size foo is not a dimension here; there are rows, hidden"),
        (
            "explain rms_norm --size hidden=-3",
            "--size must be NAME=NUMBER with a positive whole number, got 'hidden=-3'",
        ),
        ("bench rms_norm --json /no/such/folder/b.json", "the folder of /no/such/folder/b.json does not exist"),
        ("bench rms_norm --plot b.txt", "--plot must end in .png, .svg or .pdf, got b.txt"),
        ("bench moe_gate --dtype bfloat16 --device cpu", "there is nothing to measure on cpu for moe_gate"),
        ("bench nothing", "no such operator: nothing"),
        ("bench swiglu --peer apex --device cpu", "there is nothing to measure on cpu for swiglu beside apex"),
    ],
)
def test_bad_words_get_one_sentence(
    words: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dsm(monkeypatch, *words.split()) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"dsm: {sentence}")
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize("command", ["env", "doctor", "explain", "bench"])
def test_help_is_complete(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert dsm(monkeypatch, command, "--help") == 0
    assert "Usage: dsm " + command in capsys.readouterr().out
