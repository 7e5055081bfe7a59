# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""``dsm doctor``: the self-test of every operator."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. Default: the CPU, and the GPU where there is one.")
    ] = None,
) -> None:
    """Test every operator on small inputs against its formula in float64, forward and backward, in every dtype.

    An error is given relative to the largest result, and as part of what is allowed. Exit status 1 says that an
    operator failed or has no test.
    """
    import sys

    from rich import box
    from rich.console import Console
    from rich.table import Table

    from .. import doctor
    from ..bench.output import duration
    from .requests import device_named

    console = Console(highlight=False)
    with console.status("Testing every operator"):
        reports = doctor.run(device_named(device) if device else None)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("operator", "runs on", "dtype"):
        table.add_column(name, no_wrap=True)
    for name in ("error", "of allowed", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    previous = ""
    for report in reports:
        part = f"{report.max_error / report.tolerance:.0%}" if report.tolerance else ""
        verdict = f"[green]{part} ok" if report.ok else f"[bold red]{part} FAIL"
        table.add_row(
            "" if report.operator == previous else report.operator,
            report.implementation,
            report.dtype,
            f"{report.max_error:.1e}",
            verdict,
            duration(report.time_ms),
        )
        previous = report.operator
    console.print(table)
    failed = [report for report in reports if not report.ok]
    for report in failed:
        print(f"{report.operator} {report.dtype} on {report.device}: {report.note}", file=sys.stderr)
    names = len({report.operator for report in reports})
    console.print(f"{names} operators, {len(reports)} tests, {len(failed)} failed")
    if failed:
        raise typer.Exit(1)
