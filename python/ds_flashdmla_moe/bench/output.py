# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The results as a table, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from .run import Row

__all__ = ["duration", "save_json", "save_plot", "table"]


def table(rows: Sequence[Row], limits: Mapping[str, float]) -> Table:
    """One line per row; under it what the columns are relative to."""
    rates = ", ".join(f"{name} {value:,.1f} {unit}" for name, unit, value in _split(limits))
    result = Table(
        caption=f"of limit: least time by this run's copy bandwidth and matrix rate ({rates}) over the time taken. "
        "× peer: our time over the peer's, below 1 is faster. "
        "error: relative to the largest result, and as part of what is allowed.",
        caption_justify="left",
    )
    result.add_column("operator", no_wrap=True)
    result.add_column("sizes")
    result.add_column("dtype")
    result.add_column("runs on")
    for name in ("time", "host µs", "GFLOP/s", "GB/s", "of limit", "× peer", "error"):
        result.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        result.add_row(
            row.operator,
            _sizes(row),
            row.dtype,
            row.implementation,
            duration(row.time_ms),
            "" if row.device == "cpu" else f"{row.host_us:.0f}",
            _number(row.gflops),
            _number(row.gbytes),
            f"{row.of_limit:.0%}",
            "\n".join(f"{row.relative_to(peer):.2f} {peer}" for peer in row.peers),
            f"[{'green' if row.error <= row.tolerance else 'red'}]{row.error:.1e} ({row.error / row.tolerance:.0%})",
        )
    return result


def _sizes(row: Row) -> str:
    return " ".join(filter(None, [row.label, *(f"{name}={value}" for name, value in row.sizes.items())]))


def _split(limits: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """Name, unit and value, from "copy GB/s"."""
    return [(*name.rsplit(" ", 1), value) for name, value in limits.items()]  # type: ignore[misc]


def duration(milliseconds: float) -> str:
    """Three digits in the unit that suits."""
    return f"{milliseconds:.3g} ms" if milliseconds >= 1 else f"{1e3 * milliseconds:.3g} µs"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def save_json(path: Path, rows: Sequence[Row], limits: Mapping[str, float], environment: Mapping[str, Any]) -> None:
    """Everything that the table says and what it was measured on."""
    content = {"environment": environment, "limits": limits, "rows": [asdict(row) for row in rows]}
    _replace(path, json.dumps(content, indent=2).encode())


def save_plot(path: Path, rows: Sequence[Row]) -> None:
    """Our time relative to each peer's, and the part of the limit that is reached, as the file's suffix says."""
    import io

    from matplotlib.figure import Figure

    names = [f"{row.operator} {row.dtype}\n{_sizes(row)}" for row in rows]
    figure = Figure(figsize=(12, 1.5 + 0.5 * len(rows)), layout="constrained")
    relative, reached = figure.subplots(1, 2, sharey=True)
    for peer in dict.fromkeys(peer for row in rows for peer in row.peers):
        places = [i for i, row in enumerate(rows) if peer in row.peers]
        relative.scatter([rows[i].relative_to(peer) for i in places], places, label=peer, zorder=3)
    relative.axvline(1, color="0.5", linewidth=1)
    relative.set_xscale("log", base=2)
    relative.xaxis.set_major_formatter("{x:g}×")
    relative.set_xlabel("our time over the peer's (left of 1: faster)")
    if relative.get_legend_handles_labels()[0]:
        relative.legend()
    relative.set_yticks(range(len(rows)), names, fontsize=8)
    relative.invert_yaxis()
    reached.barh(range(len(rows)), [100 * row.of_limit for row in rows])
    reached.axvline(100, color="0.5", linewidth=1)
    reached.set_xlabel("% of the limit by this run's copy bandwidth and matrix rate")
    for axes in (relative, reached):
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.removeprefix(".") or "png", dpi=120)
    _replace(path, picture.getvalue())


def _replace(path: Path, content: bytes) -> None:
    """A full disk or an interruption leaves the old file as it was."""
    temporary = path.with_name(path.name + ".new")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
