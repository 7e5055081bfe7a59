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
    from rich.markup import escape
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
        "GPU": ", ".join(facts["gpus"]) or "none",
        "library": facts["library"],
        "CUDA part": ", ".join(facts["cuda architectures"]) or "not built",
    }
    for name, value in lines.items():
        # Not a table: it would cut paths to the width of the terminal.
        console.print(f"[bold]{name:<18}[/]{escape(value)}", soft_wrap=True)
    places = ["cpu", "cuda"] if facts["gpus"] else ["cpu"]
    table = Table("operator", *(f"on {place}" for place in places))
    for operator, active in facts["operators"].items():
        table.add_row(operator, *(active[place] for place in places))
    console.print(table)
