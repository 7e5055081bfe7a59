# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("operator_table", ROOT / "tools" / "operator_table.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_writes_and_then_agrees(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{tool.BEGIN}\nold\n{tool.END}\nafter\n")
    monkeypatch.setattr(tool, "README", readme)
    monkeypatch.setattr("sys.argv", ["operator_table.py", "--check"])
    assert tool.main() == 1
    assert "is old" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["operator_table.py"])
    assert tool.main() == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    row = re.search(r"`rms_norm`, `rms_norm_backward` \| ✓ \| ✓ \|  \| (\S+) \\\| (\S+) \| (\S+) \\\| (\S+) \|", text)
    assert row, text
    assert all(0 < float(error) < 1e-2 for error in row.groups())
    monkeypatch.setattr("sys.argv", ["operator_table.py", "--check"])
    assert tool.main() == 0
    readme.write_text(text.replace(row[1], "9.9e-09"))
    assert tool.main() == 0, "another processor's error is no reason to complain"
    readme.write_text(text.replace(f"{row[1]} \\|", ""))
    assert tool.main() == 1
    readme.write_text("no marks")
    assert tool.main() == 1


def test_a_row_without_its_backward_says_so(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(name: str, *rows: str) -> dict[str, object]:
        return {"family": "f", "name": name, "implementations": [{"name": row, "built": False} for row in rows]}

    monkeypatch.setattr(
        tool, "operators", lambda: [entry("a", "sm90", "cpu"), entry("a_backward", "cpu"), entry("b", "cuda", "cpu")]
    )
    assert tool.table({"a": "1.0e-07", "b": "exact"}).splitlines()[2:] == [
        "| f | `a`, `a_backward` | ✓ |  | forward | 1.0e-07 |  |",
        "|  | `b` | ✓ | ✓ |  | exact |  |",
    ]
