# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The command ``dsm``: one file per command, each with a function ``command`` that is its signature and help.

Command files import torch and the rest of the package inside the function, so that ``dsm --help`` is quick.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from . import bench, demo, doctor, env, explain, generate, quantize, train

__all__ = ["app", "main"]

app = typer.Typer(
    help="Train, run and examine DeepSeek-style models with the operators of ds-flashdmla-moe.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (demo, train, generate, quantize, env, doctor, explain, bench):
    app.command(module.__name__.rpartition(".")[2])(module.command)

_debug = False


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show Python tracebacks instead of one-line errors.")] = False,
) -> None:
    global _debug
    _debug = debug


def _sentence(error: BaseException) -> str | None:
    """What to tell about an error that bad input or the machine can cause; None for errors of the program."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error)):
        return "out of memory; take a smaller model, batch or context"
    if isinstance(error, (ValueError, OSError, NotImplementedError)):
        return " ".join(str(error).split()) or type(error).__name__
    return None


def main() -> None:
    """Entry point: errors of input or machine become one sentence on stderr and exit status 1."""
    try:
        app(prog_name="dsm")
    except Exception as error:
        message = _sentence(error)
        if _debug or message is None:
            raise
        print(f"dsm: {message}", file=sys.stderr)
        raise SystemExit(1) from None
