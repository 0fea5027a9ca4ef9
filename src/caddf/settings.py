"""Dataclasses of settings as command-line options: their names, types and defaults, with help from their docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser, Namespace

_FIELD = re.compile(r"^(\w+(?:, \w+)*): (.*)$")


def documented(settings: type) -> dict[str, str]:
    """What the docstring says of each field: paragraphs or lines `name: text`, continued until the next."""
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in (inspect.getdoc(settings) or "").splitlines():
        if match := _FIELD.match(line.strip()):
            names = match[1].split(", ")
            texts |= dict.fromkeys(names, match[2])
        elif not line.strip():
            names = []
        else:
            texts |= {name: f"{texts[name]} {line.strip()}" for name in names}
    return texts


def add_section(
    parser: ArgumentParser, name: str, settings: type, defaults: dict[str, Any] | None = None, skip: Iterable[str] = ()
) -> None:
    """Options `--NAME.FIELD` for every field but those of `skip`."""
    types, texts = get_type_hints(settings), documented(settings)
    group = parser.add_argument_group(f"{name}: {(inspect.getdoc(settings) or '').splitlines()[0]}")
    for each in dataclasses.fields(settings):
        if each.name not in skip:
            value = (defaults or {}).get(each.name, each.default)
            option = f"--{name}.{each.name}"
            group.add_argument(option, type=types[each.name], default=value, help=texts.get(each.name))


def add_options(parser: ArgumentParser, settings: type, skip: Iterable[str] = (), unset: bool = False) -> None:
    """Options `--field-name` for every field but those of `skip`; with `unset` the default is None, "as it comes"."""
    types, texts = get_type_hints(settings), documented(settings)
    for each in dataclasses.fields(settings):
        option = f"--{each.name.replace('_', '-')}"
        if each.name not in skip and option not in parser._option_string_actions:
            kind = types[each.name] | None if unset else types[each.name]
            value = None if unset else each.default
            parser.add_argument(option, type=kind, default=value, help=texts.get(each.name))


def section(settings: type, values: Namespace, **more: Any) -> Any:
    """The settings that a namespace holds, checked."""
    return settings(**{**vars(values), **more})


def options(settings: type, values: Namespace) -> dict[str, Any]:
    """The fields of `settings` that a flat namespace has, None left out."""
    names = [each.name for each in dataclasses.fields(settings)]
    return {name: values[name] for name in names if name in values and values[name] is not None}
