# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Charts as inline SVG that takes its colours from the page's CSS (see report.css)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

__all__ = ["Line", "heatmap", "line_chart"]

Point = tuple[float, float]

WIDTH, HEIGHT = 880.0, 340.0
LEFT, RIGHT, TOP, BOTTOM = 48.0, 120.0, 14.0, 40.0  # margins of the plot area; labels of lines stand on the right


@dataclass(frozen=True)
class Line:
    """``style`` is the CSS class; ``label`` is written at the last point; ``dots`` marks every point."""

    points: Sequence[Point]
    style: str
    label: str = ""
    dots: bool = False


def _ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About ``count`` round numbers (1, 2 or 5 times a power of ten apart) between low and high."""
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= count)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def line_chart(lines: Sequence[Line], *, x_label: str, y_label: str, y_range: tuple[float, float]) -> str:
    """An SVG of the lines; x runs from 0 to the last point, y through its range, and what is above that is left out."""
    x_high = max(x for line in lines for x, _ in line.points)
    y_low, y_high = y_range
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        inside = min(max(y, y_low), y_high)
        return LEFT + width * x / x_high, TOP + height * (y_high - inside) / (y_high - y_low)

    parts = [
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(y_label)} over {escape(x_label)}">'
    ]
    for y in _ticks(y_low, y_high):
        _, at = place(0, y)
        parts.append(f'<path class="grid" d="M{LEFT:g} {at:.1f}h{width:g}"/>')
        parts.append(f'<text x="{LEFT - 8:g}" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in _ticks(0, x_high):
        at, _ = place(x, y_low)
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18:g}" text-anchor="middle">{x:,g}</text>')
    parts.append(f'<text x="{LEFT + width / 2:g}" y="{HEIGHT - 4:g}" text-anchor="middle">{escape(x_label)}</text>')
    taken: list[float] = []
    for line in lines:
        placed = [place(x, y) for x, y in line.points if y <= y_high] or [place(*line.points[-1])]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
        parts.append(f'<path class="line {line.style}" d="M{path}"/>')
        if line.dots:
            parts += [f'<circle class="dot {line.style}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>' for x, y in placed]
        if line.label:
            y = placed[-1][1] + 4
            while any(abs(y - other) < 15 for other in taken):
                y += 1
            taken.append(y)
            parts.append(
                f'<text class="label {line.style}" x="{LEFT + width + 8:g}" y="{y:.1f}">{escape(line.label)}</text>'
            )
    return "".join([*parts, "</svg>"])


def heatmap(columns: Sequence[Sequence[float]], *, title: str) -> str:
    """Cells [column][row] of values in [0, 1], drawn from transparent to the accent colour; rows are numbered."""
    rows = len(columns[0])
    cell_height, left, top = 13.0, 24.0, 20.0
    width, height = 420.0, top + rows * cell_height
    edges = [round(left + (width - left) * i / len(columns), 1) for i in range(len(columns) + 1)]
    parts = [f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}">']
    parts.append(f'<text class="strong" x="{left:g}" y="12">{escape(title)}</text>')
    for row in range(rows):
        y = top + row * cell_height
        parts.append(f'<text x="{left - 6:g}" y="{y + 10:.1f}" text-anchor="end">{row}</text>')
        for values, (x, end) in zip(columns, pairwise(edges), strict=True):
            shade = min(max(values[row], 0.0), 1.0)
            size = f'width="{end - x:.1f}" height="{cell_height - 1:g}"'
            parts.append(f'<rect class="cell" x="{x:.1f}" y="{y:.1f}" {size} fill-opacity="{shade:.2f}"/>')
    return "".join([*parts, "</svg>"])
