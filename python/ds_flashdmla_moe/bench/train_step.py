# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The demo model's training step with the library's operators and with torch's own, taking turns."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..accuracy import deviation
from ..cases import Work
from ..choices import explain
from ..config import LanguageModelConfig, TrainSettings
from ..train import Trainer, load_corpus
from .limits import Limits
from .run import OURS, Row, measure

__all__ = ["NAME", "measure_train_step"]

NAME = "train_step"
CORPUS_BYTES = 1_000_000


def work_of(config: LanguageModelConfig, batch: int, parameters: int, used: int) -> Work:
    """Two operations per weight that a byte meets, forward, and four backward, and the causal half of attention.

    Bytes: every weight, gradient and moment of AdamW read and, but for the gradient, written once.
    """
    tokens = batch * config.context
    attention = 2 * config.layers * config.heads * config.context * config.d_lat  # scores and output, half of each
    return Work(6.0 * tokens * (used + attention), 4.0 * parameters * 7)


def measure_train_step(limits: Limits, seconds: float) -> Row:
    """One row; its error is that of all gradients of the first step from those of torch's operators."""
    config, settings = LanguageModelConfig(), TrainSettings()
    corpus = load_corpus((), CORPUS_BYTES)
    ours, torchs = Trainer(config, settings, corpus), Trainer(config, settings, corpus, ops=reference)
    with explain() as choices:
        ours.train_step()
    torchs.train_step()
    parameters = sum(p.numel() for p in ours.model.parameters())
    experts = config.experts * 3 * config.hidden * config.intermediate * config.layers
    used = parameters - experts + experts * config.topk // config.experts
    return measure(
        NAME,
        {OURS: ours.train_step, "torch": torchs.train_step},
        limits,
        label="the demo's model",
        sizes={"batch": settings.batch, "context": config.context, "layers": config.layers, "hidden": config.hidden},
        dtype=torch.float32,
        work=work_of(config, settings.batch, parameters, used),
        deviation=deviation(_gradients(ours), _gradients(torchs)),
        implementation="+".join(sorted({choice.implementation for choice in choices})),
        seconds=seconds,
    )


def _gradients(trainer: Trainer) -> Tensor:
    """Of the first step, up to a factor: AdamW's first moments."""
    state = trainer.optimizer.state
    return torch.cat([state[parameter]["exp_avg"].flatten() for parameter in trainer.model.parameters()])
