# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Writes the table of operators in README.md from the registry of the built library and from its self-test on the CPU.

--check compares all but the measured errors, whose digits depend on the processor.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from ds_flashdmla_moe import doctor
from ds_flashdmla_moe._library import operators

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- operators: made by tools/operator_table.py -->", "<!-- end of operators -->"
COLUMNS = {"CPU": "cpu", "CUDA (sm_80 and newer)": "cuda", "Hopper (sm_90a)": "sm90"}
ERRORS = ("error, float32 \\| bfloat16", "of the gradients")
DTYPES = ("float32", "bfloat16")
MEASURED = re.compile(r"\d\.\de[+-]\d\d|exact")
BACKWARD = "_backward"


@functools.cache
def measured_errors() -> dict[str, str]:
    """Each operator's worst error on the CPU in float32 and bfloat16, or in what it takes instead."""
    found: dict[str, dict[str, str]] = {}
    for report in doctor.run("cpu"):
        error = f"{report.max_error:.1e}" if report.max_error else "exact"
        found.setdefault(report.operator, {})[report.dtype] = error
    return {
        name: " \\| ".join(
            errors[dtype] for dtype in ([dtype for dtype in DTYPES if dtype in errors] or sorted(errors))
        )
        for name, errors in found.items()
    }


def table(errors: Mapping[str, str]) -> str:
    """Every row counts that the registry names, built here or not: the table is the same for every build."""
    rows = {entry["name"]: {row["name"] for row in entry["implementations"]} for entry in operators()}
    families = {entry["name"]: entry["family"] for entry in operators()}
    columns = (*COLUMNS, *ERRORS)
    lines = [f"| family | operator | {' | '.join(columns)} |", "| --- | --- |" + " --- |" * len(columns)]
    previous = ""
    for name in rows:
        if name.endswith(BACKWARD) and name.removesuffix(BACKWARD) in rows:
            continue
        backward = rows.get(name + BACKWARD)
        cells = [_cell(kind in rows[name], backward is None or kind in backward) for kind in COLUMNS.values()]
        cells += [errors.get(name, ""), errors.get(name + BACKWARD, "")]
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
    wanted = f"{head}{BEGIN}\n\n{table(measured_errors())}\n\n{END}{tail}"
    if "--check" not in sys.argv[1:]:
        README.write_text(wanted)
    elif MEASURED.sub("", wanted) != MEASURED.sub("", text):
        print("README.md: the table of operators is old; run tools/operator_table.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
