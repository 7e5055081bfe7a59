# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
from __future__ import annotations

import json
from pathlib import Path

import torch

import ds_flashdmla_moe as dsm
from ds_flashdmla_moe import _library, environment


def test_describes_this_machine_as_json() -> None:
    facts = json.loads(json.dumps(environment.describe()))
    assert facts["versions"]["ds-flashdmla-moe"] == dsm.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cpu"]["instruction set"] in ("avx512", "avx2", "baseline")
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert Path(facts["library"]).is_file()
    assert len(facts["gpus"]) == torch.cuda.device_count()
    built = {row["built"] for entry in _library.operators() for row in entry["implementations"] if row["name"] != "cpu"}
    if built:
        assert built == {bool(facts["cuda architectures"])}


def test_every_operator_runs_on_the_cpu() -> None:
    active = environment.active_implementations()
    assert active.keys() == {entry["name"] for entry in _library.operators()}
    assert {row["cpu"] for row in active.values()} == {"cpu"}
    assert all(("cuda" in row) == torch.cuda.is_available() for row in active.values())
