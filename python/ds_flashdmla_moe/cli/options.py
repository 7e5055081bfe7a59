# Copyright (c) 2026 The ds-flashdmla-moe authors. SPDX-License-Identifier: MIT
"""Command-line options made from the fields of a settings class."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

__all__ = ["given_options", "take", "with_settings"]

Config = TypeVar("Config")


def _parameter(field: dataclasses.Field[Any], hint: Any, panel: str) -> inspect.Parameter:
    names = [f"--{field.name.replace('_', '-')}"]
    if hint is bool:
        names = [f"{names[0]}/--no-{names[0].removeprefix('--')}"]
    if field.metadata["alias"]:
        names.append(field.metadata["alias"])
    option = typer.Option(
        *names,
        help=field.metadata["help"],
        min=field.metadata["least"],
        max=field.metadata["most"],
        rich_help_panel=panel,
    )
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(field.name, kind, default=field.default, annotation=Annotated[hint, option])


def with_settings(**panels: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command, in place of its ``**settings``, an option for every field of the classes, one help panel each."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        fields = [
            _parameter(field, get_type_hints(kind)[field.name], panel)
            for panel, kind in panels.items()
            for field in dataclasses.fields(kind)
        ]
        command.__signature__ = signature.replace(parameters=[*own, *fields])  # type: ignore[attr-defined]
        return command

    return decorate


def take(kind: type[Config], settings: Mapping[str, Any]) -> Config:
    """An instance of the class from a command's settings."""
    return kind(**{field.name: settings[field.name] for field in dataclasses.fields(kind)})  # type: ignore[arg-type]


def given_options(context: typer.Context) -> set[str]:
    """Names of the parameters that stand on the command line."""
    source = context.get_parameter_source
    return {name for name in context.params if getattr(source(name), "name", "") == "COMMANDLINE"}
