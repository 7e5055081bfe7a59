# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""``dsm train``: train a byte-level language model on text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import MAX_BYTES, LanguageModelConfig, TrainSettings
from .options import given_options, take, with_settings

if TYPE_CHECKING:
    from rich.console import Console

    from ..train import Trainer


@with_settings(Model=LanguageModelConfig, Training=TrainSettings)
def command(
    ctx: typer.Context,
    data: Annotated[
        list[Path] | None, typer.Option(help="File or folder of text; repeatable. Default: Python's standard library.")
    ] = None,
    max_bytes: Annotated[int, typer.Option(min=1, help="Read at most this much text.")] = MAX_BYTES,
    out: Annotated[Path, typer.Option(help="Folder for checkpoint and metrics.")] = Path("runs/default"),
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, to the same numbers.")] = False,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 200,
    max_minutes: Annotated[float | None, typer.Option(min=0.0, help="Save and stop after this long.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's choice.")] = None,
    **settings: Any,
) -> None:
    """Train a byte-level language model: DMLA attention and mixture-of-experts blocks, AdamW, float32.

    Writes checkpoint.safetensors and metrics.jsonl (one line per step) into --out. Ctrl-C finishes the step, saves and
    exits with status 130; --resume goes on to the same numbers as a run that was never stopped.
    """
    import torch
    from rich.console import Console

    from ..train import Trainer, load_checkpoint, load_corpus, train_in_folder
    from ..train.memory import keep_freed_memory
    from ..train.run import CHECKPOINT, StopRequest
    from .progress import TrainingProgress

    if threads is not None:
        torch.set_num_threads(threads)
    keep_freed_memory()
    path = out / CHECKPOINT
    config, training = take(LanguageModelConfig, settings), take(TrainSettings, settings)
    if not resume and path.exists():
        raise ValueError(f"{out} already holds a run: continue it with --resume or choose another --out")
    checkpoint = load_checkpoint(path) if resume else None
    corpus = load_corpus(data or (), max_bytes)
    if checkpoint is None:
        trainer = Trainer(config, training, corpus)
    else:
        given = given_options(ctx)
        trainer = Trainer.resume(checkpoint, corpus, steps=training.steps if "steps" in given else None)
        refuse_changes(trainer, {name: value for name, value in settings.items() if name in given})
    console = Console(highlight=False)
    describe(console, trainer)
    stop = StopRequest()
    with stop.listening(), TrainingProgress(console, trainer) as progress:
        train_in_folder(
            trainer,
            out,
            checkpoint_every=checkpoint_every,
            max_seconds=None if max_minutes is None else 60.0 * max_minutes,
            stop=stop,
            on_step=progress,
        )
    state = f"step {trainer.step} of {trainer.settings.steps}, saved in {path}"
    if stop.signal:
        print(f"Interrupted after {state}; --resume goes on from there.")
        raise typer.Exit(stop.exit_status)
    print(f"{'Finished' if trainer.step >= trainer.settings.steps else 'Out of time'}: {state}.")


def refuse_changes(trainer: Trainer, given: dict[str, Any]) -> None:
    """A resumed run keeps its settings; an option that says otherwise is an error, not ignored."""
    for name, value in given.items():
        kept = (
            getattr(trainer.settings, name, None) if hasattr(trainer.settings, name) else getattr(trainer.config, name)
        )
        if value != kept:
            raise ValueError(f"--{name.replace('_', '-')} is {kept} in the run to resume and cannot become {value}")


def describe(console: Console, trainer: Trainer) -> None:
    """Two lines on what is trained on what."""
    config, corpus = trainer.config, trainer.corpus
    parameters = sum(p.numel() for p in trainer.model.parameters())
    unused = 3 * config.layers * (config.experts - config.topk) * config.hidden * config.intermediate
    console.print(
        f"[bold]Model[/]  {parameters:,} parameters, {parameters - unused:,} active per byte: {config.layers} layers, "
        f"{config.heads} heads of rank {config.d_lat}, {config.topk} of {config.experts} experts",
        soft_wrap=True,
    )
    console.print(
        f"[bold]Text[/]   {corpus.source}: {corpus.files} files, {corpus.train.numel():,} bytes to train on, "
        f"{corpus.validation.numel():,} to validate",
        soft_wrap=True,
    )
