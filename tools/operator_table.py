# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Writes the table of operators in README.md from the registry of the built library; --check only compares."""

from __future__ import annotations

import sys
from pathlib import Path

from ds_flashdmla_moe._library import operators

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- operators: made by tools/operator_table.py -->", "<!-- end of operators -->"
COLUMNS = {"CPU": "cpu", "CUDA (sm_80 and newer)": "cuda", "Hopper (sm_90a)": "sm90"}
BACKWARD = "_backward"


def table() -> str:
    """Every row counts that the registry names, built here or not: the table is the same for every build."""
    rows = {entry["name"]: {row["name"] for row in entry["implementations"]} for entry in operators()}
    families = {entry["name"]: entry["family"] for entry in operators()}
    lines = [f"| family | operator | {' | '.join(COLUMNS)} |", "| --- | --- |" + " --- |" * len(COLUMNS)]
    previous = ""
    for name in rows:
        if name.endswith(BACKWARD) and name.removesuffix(BACKWARD) in rows:
            continue
        backward = rows.get(name + BACKWARD)
        cells = [_cell(kind in rows[name], backward is None or kind in backward) for kind in COLUMNS.values()]
        family = families[name] if families[name] != previous else ""
        previous = families[name]
        words = f"`{name}`" if backward is None else f"`{name}`, `{name}{BACKWARD}`"
        lines.append(f"| {family} | {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(forward: bool, backward: bool) -> str:
    return ("✓" if backward else "forward") if forward else ""


def main() -> int:
    text = README.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        print(f"README.md needs one line '{BEGIN}' and one line '{END}' after it", file=sys.stderr)
        return 1
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    wanted = f"{head}{BEGIN}\n\n{table()}\n\n{END}{tail}"
    if "--check" not in sys.argv[1:]:
        README.write_text(wanted)
    elif wanted != text:
        print("README.md: the table of operators is old; run tools/operator_table.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
