# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""``dsm env``: versions, machine, and the implementations that are active on it."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show versions, processor, GPUs, where the library is, and which implementation of each operator is active."""
    import json

    from rich.console import Console
    from rich.table import Table

    from .. import environment

    facts = environment.describe()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    console = Console(highlight=False)
    lines = {
        **facts["versions"],
        "system": facts["system"],
        "CPU": f"{facts['cpu']['model']}, {facts['cpu']['threads']} threads, {facts['cpu']['instruction set']}",
        "GPU": "\n".join(facts["gpus"]) or "none",
        "library": facts["library"],
        "CUDA part": ", ".join(facts["cuda architectures"]) or "not built",
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in lines.items():
        table.add_row(f"[bold]{name}", value)
    console.print(table)
    places = ["cpu", "cuda"] if facts["gpus"] else ["cpu"]
    table = Table("operator", *(f"on {place}" for place in places))
    for operator, active in facts["operators"].items():
        table.add_row(operator, *(active[place] for place in places))
    console.print(table)
