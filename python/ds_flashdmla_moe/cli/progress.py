# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The progress display of training: a bar on a terminal, one line per evaluation elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from ..train import StepRecord, Trainer

__all__ = ["TrainingProgress"]

SMOOTHING = 0.05  # weight of the newest step in the displayed loss and speed


class TrainingProgress:
    """Context manager; call it with each step's record and validation value (``train_in_folder``'s on_step)."""

    def __init__(self, console: Console, trainer: Trainer) -> None:
        self.console, self.settings, self.first = console, trainer.settings, trainer.step
        self.bytes_per_step = trainer.settings.batch * trainer.config.context
        self.loss, self.seconds, self.validation = 0.0, 0.0, ""
        self.last = time.monotonic()
        self.bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            expand=True,
        )
        self.task = self.bar.add_task("", total=self.settings.steps, completed=self.first, numbers="")

    def __enter__(self) -> TrainingProgress:
        self.bar.__enter__()
        self.last = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.__exit__(kind, value, trace)

    def __call__(self, record: StepRecord, validation: float | None) -> None:
        now = time.monotonic()
        weight = max(SMOOTHING, 1.0 / (record.step - self.first))
        self.loss += weight * (record.bits_per_byte - self.loss)
        self.seconds += weight * (now - self.last - self.seconds)
        self.last = now
        speed = f"{self.bytes_per_step / max(self.seconds, 1e-9):,.0f} tokens/s"
        if validation is not None:
            self.validation = f" · validation {validation:.3f}"
        numbers = f"loss {self.loss:.3f}{self.validation} bits/byte · {speed}"
        self.bar.update(self.task, completed=record.step, numbers=numbers)
        if validation is not None and not self.console.is_terminal:
            left = self.seconds * (self.settings.steps - record.step)
            print(f"step {record.step}/{self.settings.steps} · {numbers} · {left:.0f} s left", flush=True)
