# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import pytest
from dsm_command import Dsm


@pytest.fixture
def dsm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Dsm:
    return Dsm(monkeypatch, capsys)
