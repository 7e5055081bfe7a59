# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Errors at the sizes of models in service: within the table, and beside FlashMLA's on the same input."""

from __future__ import annotations

import pytest
import torch
from hostile import CUDA

from ds_flashdmla_moe.accuracy import distance
from ds_flashdmla_moe.cases import CASES, Case, Trial

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Both round probabilities to 16 bits, at other scales: of a few roots of mean squares one is a little larger.
MARGIN = 1.05


@pytest.mark.parametrize("case", [case for case in CASES if case.replayed], ids=lambda c: f"{c.operator} {c.label}")
def test_error_of_models_in_service(case: Case) -> None:
    for sizes in (case.benchmark["cuda"][0], case.benchmark["cuda"][-1]):
        trial = Trial(case, torch.bfloat16, CUDA, sizes)
        truth = trial.truth()
        error = trial.forward_deviation(truth)
        ours = distance(trial.forward()[0][truth.entries], truth.values[0])
        print(f"{dict(sizes)}: {error.ratio:.3f} of the allowed error, rms {ours.rms:.3e}, worst {ours.worst:.3e}")
        assert error.ratio <= 1
        if peer := case.peers("cuda").get("FlashMLA"):
            theirs = distance(trial.of(peer).forward()[0][truth.entries], truth.values[0])
            print(f"FlashMLA: rms {theirs.rms:.3e}, worst {theirs.worst:.3e}")
            assert ours.rms <= MARGIN * theirs.rms
