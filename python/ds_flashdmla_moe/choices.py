# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Which implementation ran, and why the better ones did not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import overload

import torch

from . import _library  # noqa: F401  (registers torch.ops.dsm)

__all__ = ["Choice", "Choices", "explain"]


@dataclass(frozen=True)
class Choice:
    """One choice of the registry; ``rejections`` are the rows asked before, best first, each with its reason."""

    operator: str
    implementation: str
    rejections: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        refused = "; ".join(f"{name} {reason}" for name, reason in self.rejections)
        return f"{self.operator}: {self.implementation}" + (f" ({refused})" if refused else "")


class Choices(Sequence[Choice]):
    """The choices made so far inside :func:`explain`, in call order; consecutive equal ones once. Prints as a list."""

    def __init__(self) -> None:
        self._final: list[Choice] | None = None

    def _now(self) -> list[Choice]:
        if self._final is not None:
            return self._final
        return [
            Choice(
                record["operation"],
                record["implementation"],
                tuple((row["implementation"], row["reason"]) for row in record["rejections"]),
            )
            for record in json.loads(torch.ops.dsm.recorded_choices())
        ]

    def _close(self) -> None:
        self._final = self._now()

    @overload
    def __getitem__(self, index: int) -> Choice: ...
    @overload
    def __getitem__(self, index: slice) -> list[Choice]: ...
    def __getitem__(self, index: int | slice) -> Choice | list[Choice]:
        return self._now()[index]

    def __len__(self) -> int:
        return len(self._now())

    def __str__(self) -> str:
        return "\n".join(map(str, self._now())) or "no operator was called"

    def of(self, operator: str) -> Choice | None:
        """The latest choice for an operator; None when it was not called."""
        return next((choice for choice in reversed(self._now()) if choice.operator == operator), None)


_open = False


@contextmanager
def explain() -> Iterator[Choices]:
    """Records which implementation every operator call in this process chooses, and why better ones refused.

    >>> with dsm.explain() as choices:
    ...     model(x)
    >>> print(choices)

    Raises:
        RuntimeError: inside another ``explain``; the record is one for the process.
    """
    global _open
    if _open:
        raise RuntimeError("explain: the record is one for the process and cannot be nested")
    _open = True
    choices = Choices()
    torch.ops.dsm.record_choices(True)
    try:
        yield choices
    finally:
        torch.ops.dsm.record_choices(False)
        choices._close()
        _open = False
