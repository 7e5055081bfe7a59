# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""``dsm generate``: continue a text with a trained model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def command(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint of dsm train, or the run folder that holds it.")],
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads it from standard input.")] = "",
    max_new_bytes: Annotated[int, typer.Option("--max-new-bytes", "--max-tokens", min=0, help="Bytes to write.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest byte each time.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest bytes of this total probability.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same text.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads (default: torch's choice).")] = None,
) -> None:
    """Continue a prompt with a trained model and stream the text to standard output.

    Decoding keeps a latent cache: 2·heads·d_lat numbers per layer and byte. The prompt is echoed.
    """
    import codecs

    import torch

    from ..train import generate, load_checkpoint, model_from_checkpoint
    from ..train.run import CHECKPOINT

    if threads is not None:
        torch.set_num_threads(threads)
    path = checkpoint / CHECKPOINT if checkpoint.is_dir() else checkpoint
    model = model_from_checkpoint(load_checkpoint(path))
    text = sys.stdin.buffer.read() if prompt == "-" else prompt.encode("utf-8", "surrogateescape")
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may span several bytes
    sys.stdout.write(decoder.decode(text))
    for byte in generate(model, text, max_new_bytes, temperature=temperature, top_p=top_p, seed=seed):
        sys.stdout.write(decoder.decode(bytes([byte])))
        sys.stdout.flush()
    sys.stdout.write(decoder.decode(b"", final=True) + "\n")
