# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""``dsm explain``: which implementation a request gets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..cases import Trial
    from ..choices import Choice


def command(
    operators: Annotated[list[str] | None, typer.Argument(help="Operators. Default: all.")] = None,
    dtype: Annotated[str, typer.Option(help="float64, float32, float16 or bfloat16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: a GPU where there is one.")] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="A dimension of the request, as hidden=7168; repeatable.")
    ] = None,
) -> None:
    """Show which implementation takes a request, and why the better ones refuse it.

    The operators are called on random inputs: small ones, unless --size says otherwise. An operator that does not take
    the dtype is asked in float32. Exit status 1 says that some request is taken by no implementation. In Python,
    "with ds_flashdmla_moe.explain() as choices:" shows the same for any code.
    """
    import torch
    from rich.console import Console
    from rich.table import Table

    from ..cases import Trial, cases_of
    from .requests import device_named, dtype_named, sized

    place, wanted_dtype = device_named(device), dtype_named(dtype)
    table = Table("operator", "request", "runs on", "refused by", show_lines=True)
    missing = []
    for case, sizes in sized(cases_of(operators or ()), size or ()):
        own_dtype = wanted_dtype if wanted_dtype in case.dtypes else torch.float32
        trial = Trial(case, own_dtype, place, sizes)
        words = [case.label, *(f"{name}={value}" for name, value in sizes.items())]
        request = " ".join(filter(None, [*words, str(own_dtype).removeprefix("torch."), str(place)]))
        for operator in dict.fromkeys(case.operators):
            if operators and operator not in operators:
                continue
            choice = _ask(operator, trial)
            if not choice.implementation:
                missing.append(operator)
            refused = "\n".join(f"{name}: {reason}" for name, reason in choice.rejections)
            table.add_row(operator, request, choice.implementation or "[bold red]none", refused)
    Console(highlight=False).print(table)
    if missing:
        raise typer.Exit(1)


def _ask(operator: str, trial: Trial) -> Choice:
    """The registry's choice, also when it is none; errors before the registry is asked are raised."""
    from ..choices import explain

    with explain() as choices:
        try:
            if operator == trial.case.operator:
                trial.forward()
            else:
                trial.backward()
        except (ValueError, RuntimeError):
            if not choices or choices[-1].implementation:
                raise
    choice = choices.of(operator)
    # A backward operator is not reached when the forward one is refused: that refusal is then the answer.
    return choice if choice else choices[-1]
