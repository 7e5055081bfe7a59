# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""``dsm quantize``: a model folder with quantised matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def command(
    model: Annotated[Path, typer.Option(help="Folder with config.json and safetensors: DeepSeek-V3, V3.2 or V4.")],
    to: Annotated[Literal["nvfp4", "mxfp4", "fp8"], typer.Option(help="Format of the matrices.")],
    out: Annotated[Path, typer.Option(help="Folder to write: new, empty, or begun before from the same model.")],
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads (default: torch's choice).")] = None,
) -> None:
    """Quantise the matrices of a model folder: experts, feed-forward layers and attention.

    Norms, gates, embeddings, the head, kv_b_proj (V4: o_a_proj, compressors, hyper-connections) and blocks that predict
    further tokens stay as they are; config.json lists what is not quantised. If it is interrupted, the same command
    goes on where it stopped; a folder that holds anything else is not touched.
    """
    import torch
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from ..models.quantize import quantize_model

    if threads is not None:
        torch.set_num_threads(threads)
    console = Console()
    with Progress(
        TextColumn(f"[bold]to {to}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("tensors"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        expand=True,
    ) as bar:
        task = bar.add_task("", total=None)

        def show(done: int, count: int) -> None:
            bar.update(task, completed=done, total=count)
            if not console.is_terminal and done * 10 // count > (done - 1) * 10 // count:
                print(f"{done}/{count} tensors", flush=True)

        result = quantize_model(model, out, to, show)
    sizes = f"{result.bytes_before / 1e6:,.1f} MB to {result.bytes_after / 1e6:,.1f} MB"
    print(f"{out}: {result.quantized} of {result.weights} tensors quantised to {to}, {sizes}")
