# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""What the benchmark measures on a GPU."""

from __future__ import annotations

import pytest
import torch

from ds_flashdmla_moe.bench import timing
from ds_flashdmla_moe.cases import CASES, Case, Trial

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("replayed", [False, True])
def test_the_time_is_that_of_the_device(replayed: bool) -> None:
    """A call that keeps the device busy for a millisecond, more at a low clock, and one that does next to nothing."""
    small = torch.ones(8, device=CUDA)
    calls = {"long": lambda: torch.cuda._sleep(2_000_000), "short": lambda: small.add_(1)}
    times = timing.take_turns(calls, CUDA, 0.1, replayed=replayed)
    assert 0.5e-3 < times["long"].device < 2e-2
    assert times["short"].device < 1e-4
    assert all(time.host < 1e-3 for time in times.values())


@pytest.mark.parametrize("case", [case for case in CASES if case.replayed], ids=lambda c: f"{c.operator} {c.label}")
def test_what_is_replayed_is_the_whole_call(case: Case) -> None:
    """The graph fills the same results with their values again."""
    trial = Trial(case, torch.bfloat16, CUDA)
    expected = [output.clone() for output in trial.forward()]
    kept: list[tuple[torch.Tensor, ...]] = []
    replay = timing._captured(lambda: kept.append(trial.forward()))
    (outputs,) = kept
    for output in outputs:
        output.zero_()
    replay()
    for output, value in zip(outputs, expected, strict=True):
        assert torch.equal(output, value)
