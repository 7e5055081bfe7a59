# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The command ``dsm`` in this process."""

from __future__ import annotations

import sys

import pytest

from ds_flashdmla_moe.cli import main


class Dsm:
    """Runs the command."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """Exit status, standard output, standard error."""
        self.monkeypatch.setattr(sys, "argv", ["dsm", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = self.capsys.readouterr()
        return int(exit.value.code or 0), out, err

    def refused(self, *arguments: object) -> str:
        """The one sentence on standard error."""
        status, _, err = self(*arguments)
        assert status == 1
        assert err.startswith("dsm: ")
        assert err.count("\n") == 1
        return err

    def misused(self, *arguments: object) -> str:
        """What is said of options that do not go together."""
        status, _, err = self(*arguments)
        assert status == 2
        return err
