# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""The demo's report: one HTML file with everything in it, light or dark as the reader's system is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import LanguageModelConfig, TrainSettings
from .charts import Line, heatmap, line_chart

if TYPE_CHECKING:
    from ..doctor import OperatorReport

__all__ = ["DemoResult", "read_metrics", "write_report"]

Table = Sequence[Sequence[str]]


@dataclass(frozen=True)
class DemoResult:
    """Everything the report tells; ``metrics`` are the lines of metrics.jsonl, samples follow ``prompt``."""

    config: LanguageModelConfig
    settings: TrainSettings
    parameters: int
    corpus: str
    metrics: Sequence[Mapping[str, Any]]
    bits_per_byte: float
    baselines: Mapping[str, float]
    seconds: float
    prompt: str
    sample_before: str
    sample_after: str
    operators: Sequence[OperatorReport]
    versions: Mapping[str, str]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_report(path: Path, result: DemoResult) -> None:
    """Write the page; an older one is replaced only by a whole new one."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(_page(result))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _page(result: DemoResult) -> str:
    css = (resources.files(__package__) / "report.css").read_text()
    sections = [_facts, _comparison, _loss, _experts, _samples, _operators, _settings]
    body = "\n".join(section(result) for section in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>ds-flashdmla-moe: demo report</title><style>{css}</style></head>\n<body><main>\n{body}\n"
        "</main></body></html>\n"
    )


def _table(head: Sequence[str], rows: Table, numbers: Sequence[int] = (), own: int | None = None) -> str:
    """Cells are HTML; ``numbers`` are the right-aligned columns, ``own`` the emphasised row."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="number">{value}</{tag}>' if i in numbers else f"<{tag}>{value}</{tag}>"
            for i, value in enumerate(values)
        )

    lines = [f"<tr{' class=own' if i == own else ''}>{cells('td', row)}</tr>" for i, row in enumerate(rows)]
    return f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _steps(result: DemoResult) -> list[Mapping[str, Any]]:
    return [record for record in result.metrics if "expert_load" in record]


def _facts(result: DemoResult) -> str:
    steps = _steps(result)
    tokens = sum(record["bytes"] for record in steps)
    speed = tokens / max(sum(record["seconds"] for record in steps), 1e-9)
    trigram = result.baselines["Trigram"]
    margin = 100 * (1 - result.bits_per_byte / trigram)
    facts = [
        (f"{result.bits_per_byte:.3f}", "bits per byte on validation text"),
        (f"{abs(margin):.0f} % {'below' if margin > 0 else 'above'}", f"the trigram model's {trigram:.3f}"),
        (f"{result.seconds / 60:.1f} min", f"of training: {len(steps):,} steps, {tokens / 1e6:.2f} million bytes"),
        (f"{speed:,.0f}", "bytes per second, forward and backward"),
    ]
    cards = "".join(f'<div class="fact"><b>{value}</b><span>{escape(text)}</span></div>' for value, text in facts)
    config = result.config
    return (
        "<h1>A small language model, trained on this machine</h1>"
        f"<p>{config.layers} blocks of latent attention (Flash-DMLA) and a mixture of experts, {result.parameters:,} "
        "parameters, trained byte by byte with the operators of ds-flashdmla-moe on "
        f"{escape(result.corpus)}.</p><div class='facts'>{cards}</div>"
    )


def _comparison(result: DemoResult) -> str:
    rows = [("This model", result.bits_per_byte), *result.baselines.items()]
    rows.sort(key=lambda row: row[1])
    worst = max(value for _, value in rows)
    cells = [
        [escape(name), f"{value:.4f}", f'<span class="meter"><i style="width:{100 * value / worst:.0f}%"></i></span>']
        for name, value in rows
    ]
    own = next(i for i, (name, _) in enumerate(rows) if name == "This model")
    return (
        "<h2>Against counting</h2><p>Bits needed per byte of text that no model has seen; less is better. The bigram "
        "and trigram models are counted on the same training split and smoothed (interpolated Witten-Bell).</p>"
        f"<figure>{_table(['Model', 'bits per byte', ''], cells, numbers=[1], own=own)}</figure>"
    )


def _loss(result: DemoResult) -> str:
    raw = [(float(record["step"]), float(record["bits_per_byte"])) for record in _steps(result)]
    last = raw[-1][0]
    smooth, value = [], raw[0][1]
    for step, bits in raw:
        value += 0.06 * (bits - value)
        smooth.append((step, value))
    lines = [
        Line([(0.0, bits), (last, bits)], "baseline", f"{name} {bits:.2f}") for name, bits in result.baselines.items()
    ]
    validation = [
        (float(record["step"]), record["validation_bits_per_byte"])
        for record in result.metrics
        if "validation_bits_per_byte" in record
    ]
    lines += [Line(raw, "raw")]
    if validation:
        lines.append(Line(validation, "validation", f"validation {validation[-1][1]:.2f}", dots=True))
    lines.append(Line(smooth, "train", f"training {smooth[-1][1]:.2f}"))
    low = min(min(bits for _, bits in line.points) for line in lines)
    high = max(6.0, low + 1.0, *(bits + 0.2 for bits in result.baselines.values()))
    chart = line_chart(lines, x_label="step", y_label="bits per byte", y_range=(max(0.0, low - 0.2), high))
    return (
        f"<h2>Loss</h2><figure>{chart}<figcaption>Bits per byte of each training batch (faint), its running mean, and "
        f"of validation text on the way (dots). Values over {high:.0f} at the very beginning are cut off."
        "</figcaption></figure>"
    )


def _experts(result: DemoResult) -> str:
    steps, config = _steps(result), result.config
    bins = min(60, len(steps))
    edges = [len(steps) * i // bins for i in range(bins + 1)]
    maps = []
    for layer in range(config.layers):
        columns = []
        for begin, end in pairwise(edges):
            loads = [record["expert_load"][layer] for record in steps[begin:end]]
            columns.append([sum(share) / len(loads) * config.experts / 2 for share in zip(*loads, strict=True)])
        busiest = max(columns[-1]) * 2
        maps.append(heatmap(columns, title=f"Layer {layer} · busiest expert at the end: {busiest:.2f} × even"))
    return (
        f"<h2>Who does the work</h2><p>Each byte is sent to {config.topk} of {config.experts} experts per layer. A row "
        "is an expert, time runs to the right.</p>"
        f"<figure><div class='pair'>{''.join(maps)}</div><figcaption>Share of the load: 0<span class='legend'></span>"
        "twice the even share</figcaption></figure>"
    )


def _samples(result: DemoResult) -> str:
    def sample(title: str, text: str) -> str:
        return f"<figure><b>{title}</b><pre><b>{escape(result.prompt)}</b>{escape(text)}</pre></figure>"

    return (
        "<h2>What it writes</h2><p>The continuation of the highlighted prompt, sampled byte by byte through the latent "
        f"cache.</p><div class='pair'>{sample('Before training', result.sample_before)}"
        f"{sample('After training', result.sample_after)}</div>"
    )


def _operators(result: DemoResult) -> str:
    rows = []
    for row in result.operators:
        share = min(100.0, 100.0 * row.max_error / row.tolerance) if row.tolerance > 0 else 100.0 * (row.max_error > 0)
        verdict = '<span class="ok">ok</span>' if row.ok else '<span class="failed">failed</span>'
        rows.append(
            [
                escape(row.operator),
                escape(row.implementation),
                escape(row.dtype),
                f"{row.max_error:.1e}",
                f"{row.tolerance:.1e}",
                f'<span class="meter"><i style="width:{share:.0f}%"></i></span>',
                f"{row.time_ms:.3f}",
                verdict,
            ]
        )
    head = ["Operator", "Implementation", "dtype", "worst error", "allowed", "", "ms", ""]
    return (
        "<h2>Operators against float64</h2><p>Every operator on a small input, compared with a float64 evaluation of "
        f"its formula.</p><figure>{_table(head, rows, numbers=[3, 4, 6])}</figure>"
    )


def _settings(result: DemoResult) -> str:
    def table(values: Mapping[str, Any]) -> str:
        rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(str(v))}</td></tr>" for k, v in values.items())
        return f'<table class="settings">{rows}</table>'

    def card(title: str, values: Mapping[str, Any]) -> str:
        return f"<figure><b>{title}</b>{table(values)}</figure>"

    return (
        f"<h2>Settings and versions</h2><div class='pair'>{card('Model', asdict(result.config))}"
        f"{card('Training', asdict(result.settings))}</div>{card('Versions', result.versions)}"
    )
