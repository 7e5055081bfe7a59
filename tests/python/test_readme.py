# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "load_model" in EXAMPLES[number]:
        monkeypatch.syspath_prepend(str(Path(__file__).parent / "models"))
        from model_folders import v4

        v4().save_pretrained("DeepSeek-V4")
    exec(compile(EXAMPLES[number], f"{README}, example {number}", "exec"), {})


def test_there_are_examples() -> None:
    assert EXAMPLES
