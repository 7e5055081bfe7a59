# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The demo at a toy size, and its report."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from ds_flashdmla_moe import doctor
from ds_flashdmla_moe.cli import demo, main
from ds_flashdmla_moe.cli.charts import Line, _ticks, heatmap, line_chart
from ds_flashdmla_moe.config import LanguageModelConfig
from ds_flashdmla_moe.doctor import OperatorReport

TINY = LanguageModelConfig(
    layers=2, hidden=16, heads=2, head_dim=8, d_lat=6, experts=4, intermediate=8, shared_intermediate=8, context=16
)
REPORTS = [
    OperatorReport("rms_norm", "cpu", "float32", 1e-7, 1e-5, 0.01, True),
    OperatorReport("moe_ffn", "cpu", "bfloat16", 1e-3, 8e-3, 1.5, True),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Two files, one for each side of the split, with characters that HTML gives a meaning."""
    path = tmp_path / "text"
    path.mkdir()
    for i in range(40):
        (path / f"{i}.txt").write_text(f"<b>the quick & brown fox number {i} jumps over the lazy dog</b>\n" * 10)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object, reports: list[OperatorReport] = REPORTS) -> int:
    monkeypatch.setattr(demo, "LanguageModelConfig", lambda: TINY)
    monkeypatch.setattr(doctor, "run", lambda: reports)
    monkeypatch.setattr(sys, "argv", ["dsm", "demo", "--threads", "1", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        main()
    return int(exit.value.code or 0)


class Page(HTMLParser):
    """Checks nesting, collects tags and whatever a browser would fetch."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.external: list[str] = []
        self.words = ""
        self.feed(source)
        assert not self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.external += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "br", "path", "rect", "circle", "img", "link"):
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "rect", "circle"):
            assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.stack or self.stack[-1] != "style":
            self.words += data


def test_demo_writes_a_self_contained_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    status = run(monkeypatch, "--data", text, "--out", out, "--steps", 30)
    output, errors = capsys.readouterr()
    assert status == 1  # 30 steps do not beat a trigram model, and the demo says so
    assert "does not beat the trigram model" in errors
    assert errors.count("\n") == 1
    report = out / "report.html"
    assert f"Report: {report}" in output.replace("\n", "")
    source = report.read_text()
    page = Page(source)
    assert not page.external
    assert "url(" not in source
    assert "@import" not in source
    assert page.tags.count("svg") == 1 + TINY.layers
    for word in (
        "Trigram",
        "Bigram",
        "This model",
        "rms_norm",
        "moe_ffn",
        "Before training",
        "After training",
        "torch",
    ):
        assert word in page.words
    assert {p.name for p in out.iterdir()} == {"report.html", "checkpoint.safetensors", "metrics.jsonl"}


def test_demo_succeeds_when_the_model_wins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("ds_flashdmla_moe.train.ngram_bits_per_byte", lambda train, span, order: 12.0 - order)
    assert run(monkeypatch, "--data", text, "--out", tmp_path / "out", "--steps", 40) == 0
    assert not capsys.readouterr().err


def test_demo_reports_failed_operators(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path
) -> None:
    failed = OperatorReport("rope", "cpu", "float32", 1.0, 1e-5, 0.1, False, note="wrong")
    monkeypatch.setattr("ds_flashdmla_moe.train.ngram_bits_per_byte", lambda train, span, order: 12.0 - order)
    out = tmp_path / "out"
    assert run(monkeypatch, "--data", text, "--out", out, "--steps", 2, reports=[*REPORTS, failed]) == 1
    assert "these operators failed their check: rope" in capsys.readouterr().err
    assert 'class="failed"' in (out / "report.html").read_text()


def test_no_time_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: Path, tmp_path: Path
) -> None:
    assert run(monkeypatch, "--data", text, "--out", tmp_path / "out", "--max-minutes", 0) == 1
    assert "no time for a single step" in capsys.readouterr().err


@pytest.mark.parametrize(("low", "high"), [(0.0, 6.0), (1.8, 6.0), (0.0, 2000.0), (0.0, 1.0), (0.0, 7.0)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    ticks = _ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert ticks == sorted(ticks)
    assert all(low - 1e-9 <= tick <= high + 1e-9 and len(f"{tick:g}") <= 5 for tick in ticks)


def test_charts_are_wellformed_and_keep_inside() -> None:
    lines = [Line([(1.0, 9.0), (2.0, -3.0)], "train", "a <label>"), Line([(1.0, 2.0)], "validation", "b", dots=True)]
    source = line_chart(lines, x_label="x", y_label="y", y_range=(0.0, 6.0))
    page = Page(source)
    assert "a <label>" in page.words
    assert "nan" not in source
    assert "M458.0 14.0L760.0 300.0" in source or "14.0L760.0 300.0" in source  # clipped to the plot's top and bottom
    cells = heatmap([[0.0, 0.5], [1.0, 2.0]], title="t & u")
    assert Page(cells).tags.count("rect") == 4
    assert 'fill-opacity="1.00"' in cells
