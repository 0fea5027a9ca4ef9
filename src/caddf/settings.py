"""Dataclasses of settings as command-line options: names, types and defaults from their fields, help from docstrings.

What the parser says of bad arguments becomes an `InputError` of one sentence here.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from argparse import SUPPRESS
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from caddf.errors import InputError

_VALUE = re.compile(r'Parser key "(?P<name>.+?)": .*(?:Got|Given) value: (?P<value>.*)')
_EXPECTED = re.compile(r"Expected an? (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])")
_NAMES = {"int": "a whole number", "float": "a number", "bool": "true or false", "tuple": "a list, as in [1,2]"}
_SENTENCES = (
    (re.compile(r"unrecognized arguments: (\S+)|Option '(.*)' is not accepted"), "there is no setting {0}"),
    (re.compile(r"argument (\S+): expected one argument"), "{0} is given without a value"),
    (re.compile(r"the following arguments are required: (.*)"), "{0} must be given"),
)


class _Help(DefaultHelpFormatter):
    """Each option's text and its default."""

    def _get_help_string(self, action: Any) -> str:
        text, default = action.help or "", action.default
        unset = default is None or default is False or default == SUPPRESS
        return text if unset else f"{text} (default: %(default)s)"


def new_parser(command: str, takes: str, about: str) -> ArgumentParser:
    """A parser that raises instead of exiting; `--help` prints and exits."""
    return ArgumentParser(
        prog=command,
        usage=f"{command} {takes}",
        description=about,
        exit_on_error=False,
        formatter_class=_Help,
        allow_abbrev=False,
    )


def parse(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """The values of all options; raises `InputError` on names and values that are wrong."""
    try:
        return parser.parse_args(arguments)
    except ArgumentError as error:
        raise InputError(_sentence(" ".join(error.message.split()), parser.prog)) from None


def _sentence(text: str, command: str) -> str:
    """jsonargparse's message, which lists types and parser keys, as a sentence."""
    if match := _VALUE.fullmatch(text):
        right = [
            _NAMES.get(kind, kind) if kind else f"one of {choices.replace(chr(39), '')}"
            for kind, choices in _EXPECTED.findall(text)
            if kind != NoneType.__name__
        ]
        return f"{match['name']} is {match['value']}; it must be {' or '.join(dict.fromkeys(right))}"
    for pattern, sentence in _SENTENCES:
        if match := pattern.match(text):
            said = sentence.format(next(group for group in match.groups() if group))
            return f"{said}; {command} --help explains every setting"
    return text


def documented(settings: type) -> dict[str, str]:
    """What a dataclass's docstring says of its fields: `name: text` or `name, name: text`, up to the next of them."""
    names = "|".join(each.name for each in dataclasses.fields(settings))
    label = re.compile(rf"(?:^\s*|(?<=\. ))((?:{names})(?:, (?:{names}))*): ", re.MULTILINE)
    texts: dict[str, str] = {}
    for paragraph in (inspect.getdoc(settings) or "").split("\n\n"):
        _, *parts = label.split(paragraph)
        for labels, text in zip(parts[::2], parts[1::2], strict=True):
            texts |= dict.fromkeys(labels.split(", "), " ".join(text.replace("`", "").split()).removesuffix("."))
    return texts


def add_section(
    parser: ArgumentParser, name: str, settings: type, defaults: dict[str, Any] | None = None, skip: Iterable[str] = ()
) -> None:
    """Options `--NAME.FIELD` for every field but those of `skip`."""
    group = parser.add_argument_group(f"{name}: {(inspect.getdoc(settings) or '').splitlines()[0].removesuffix('.')}")
    for field, kind, text in _fields(settings, skip):
        default = (defaults or {}).get(field.name, field.default)
        group.add_argument(f"--{name}.{field.name}", type=kind, default=default, help=text, metavar=_metavar(kind))


def add_options(parser: ArgumentParser, settings: type, skip: Iterable[str] = ()) -> None:
    """Options `--field-name` for every field but those of `skip`."""
    for field, kind, text in _fields(settings, skip):
        parser.add_argument(_flag(field.name), type=kind, default=field.default, help=text, metavar=_metavar(kind))


def add_choices(parser: ArgumentParser, title: str, table: Mapping[str, type], skip: Iterable[str] = ()) -> None:
    """Options for the fields of all classes of `table`, one for all that share a name; not set, the class's default."""
    group = parser.add_argument_group(title)
    shared: dict[str, list[tuple[str, Any, str]]] = {}
    for name, settings in table.items():
        for field, kind, text in _fields(settings, skip):
            shared.setdefault(field.name, []).append((name, kind, text))
    for option, owners in shared.items():
        kind, text = owners[0][1] | None, next((text for *_, text in owners if text), "")
        of = ", ".join(name for name, *_ in owners)
        group.add_argument(_flag(option), type=kind, help=f"{text} [{of}]".lstrip(), metavar=_metavar(kind))


def _fields(settings: type, skip: Iterable[str]) -> list[tuple[dataclasses.Field, Any, str]]:
    """Each field, its type and its help."""
    kinds, texts = get_type_hints(settings), documented(settings)
    fields = (field for field in dataclasses.fields(settings) if field.name not in skip)
    return [(field, kinds[field.name], texts.get(field.name, "")) for field in fields]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _metavar(kind: Any) -> str:
    """`INT`, `FLOAT`, `{true,false}` or the choices: what the option takes."""
    if get_origin(kind) is Literal:
        return f"{{{','.join(get_args(kind))}}}"
    if get_origin(kind) is tuple:
        return f"[{_metavar(get_args(kind)[0])},...]"
    if NoneType in get_args(kind):
        return _metavar(next(each for each in get_args(kind) if each is not NoneType))
    return "{true,false}" if kind is bool else kind.__name__.upper()


def section(settings: type, values: Namespace | None) -> Any:
    """The settings of a section's namespace, checked; a section without settings has none."""
    return settings(**vars(values or Namespace()))


def options(settings: type, values: Namespace) -> dict[str, Any]:
    """The fields of `settings` that a flat namespace has, None left out."""
    names = [each.name for each in dataclasses.fields(settings)]
    return {name: values[name] for name in names if name in values and values[name] is not None}
