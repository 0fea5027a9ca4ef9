"""Dataclasses of settings as command-line options: names, types and defaults from their fields, help from docstrings.

What the parser says of bad arguments becomes an `InputError` of one sentence here.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from argparse import SUPPRESS, ArgumentTypeError
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from caddf.errors import InputError, nearest

_VALUE = re.compile(r'Parser key "(?P<name>.+?)": .*(?:Got|Given) value: (?P<value>.*)')
_EXPECTED = re.compile(r"Expected an? (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])")
_NAMES = {"int": "a whole number", "float": "a number", "bool": "true or false"}
_UNKNOWN = re.compile(r"unrecognized arguments: ([^\s=]+).*|Option '([^=]*).*' is not accepted.*")
_LIST = re.compile(r"argument --(\S+): (is .*)")
_SENTENCES = (
    (
        re.compile(r"argument (\S+): expected one argument"),
        "{0} is given without a value (one that begins with a dash follows =, as in {0}=-1)",
    ),
    (re.compile(r"the following arguments are required: (.*)"), "{0} must be given"),
)


@dataclasses.dataclass(frozen=True)
class _Listed:
    """The values of `1,8`; nothing is none of them. Brackets around them do no harm."""

    kind: type

    def __call__(self, text: Any) -> tuple[Any, ...]:
        if not isinstance(text, str):  # a default
            return tuple(text)
        words = text.removeprefix("[").removesuffix("]").split(",")
        try:
            return () if words == [""] else tuple(self.kind(word) for word in words)
        except ValueError:
            right = "numbers, as in 0.5,1" if self.kind is float else "whole numbers, as in 1,8"
            raise ArgumentTypeError(f"is {text}; it must be {right}") from None


class _Help(DefaultHelpFormatter):
    """Each option's text and its default."""

    def _get_help_string(self, action: Any) -> str:
        text, default = action.help or "", action.default
        if default in (None, "", SUPPRESS) or action.nargs == 0:
            return text
        return f"{text} (default: {_shown(default)})".replace("%", "%%")


def _shown(default: Any) -> str:
    """A value as the command line would give it."""
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return str(default).lower() if isinstance(default, bool) else str(default)


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
        raise InputError(_sentence(" ".join(error.message.split()), parser)) from None


def names_of(parser: ArgumentParser) -> list[str]:
    """What can be set: `seed`, `train.steps`."""
    return [option.removeprefix("--") for option in parser._option_string_actions if option.startswith("--")]


def _sentence(text: str, parser: ArgumentParser) -> str:
    """jsonargparse's message, which lists types and parser keys, as a sentence."""
    see = f"; {parser.prog} --help explains every setting"
    if match := _VALUE.fullmatch(text):
        right = [
            _NAMES.get(kind, kind) if kind else f"{'one of ' * (',' in choices)}{choices.replace(chr(39), '')}"
            for kind, choices in _EXPECTED.findall(text)
            if kind != NoneType.__name__
        ]
        return f"{match['name']} is {match['value']}; it must be {' or '.join(dict.fromkeys(right))}"
    if match := _LIST.fullmatch(text):
        return f"{match[1].replace('-', '_')} {match[2]}"
    if match := _UNKNOWN.fullmatch(text):
        name = match[1] or match[2]
        if not name.startswith("-"):
            return f"{name} stands by itself, without a setting before it; text of several words needs quotes{see}"
        return f"there is no setting {name}{nearest(name.removeprefix('--'), names_of(parser), '--')}{see}"
    for pattern, sentence in _SENTENCES:
        if match := pattern.match(text):
            return sentence.format(match[1]) + see
    return text


def documented(settings: type) -> dict[str, str]:
    """What the docstrings of a dataclass, and of those that it extends, say of its fields.

    They say it as `name: text` or `name, name: text`, up to the next of them.
    """
    names = "|".join(each.name for each in dataclasses.fields(settings))
    label = re.compile(rf"(?:^\s*|(?<=\. ))((?:{names})(?:, (?:{names}))*): ", re.MULTILINE)
    texts: dict[str, str] = {}
    documents = [inspect.cleandoc(each.__doc__ or "") for each in reversed(settings.__mro__)]
    for paragraph in "\n\n".join(documents).split("\n\n"):
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
        group.add_argument(
            f"--{name}.{field.name}", type=_parsed(kind), default=default, help=text, metavar=_metavar(kind)
        )


def add_options(parser: ArgumentParser, settings: type, skip: Iterable[str] = ()) -> None:
    """Options `--field-name` for every field but those of `skip`."""
    for field, kind, text in _fields(settings, skip):
        parser.add_argument(
            _flag(field.name), type=_parsed(kind), default=field.default, help=text, metavar=_metavar(kind)
        )


def add_choices(parser: ArgumentParser, title: str, table: Mapping[str, type], skip: Iterable[str] = ()) -> None:
    """Options for the fields of all classes of `table`, one for all that share a name; not set, the class's default.

    The help of an option has what each class says of it, and of which classes it is.
    """
    group = parser.add_argument_group(title)
    shared: dict[str, list[tuple[str, Any, str]]] = {}
    for name, settings in table.items():
        for field, kind, text in _fields(settings, skip):
            shared.setdefault(field.name, []).append((name, kind, text))
    for option, owners in shared.items():
        kind = owners[0][1] | None
        said: dict[str, list[str]] = {}
        for name, _, text in owners:
            said.setdefault(text, []).append(name)
        text = "; ".join(f"{text} [{', '.join(names)}]".lstrip() for text, names in said.items())
        group.add_argument(_flag(option), type=kind, help=text, metavar=_metavar(kind))


def _fields(settings: type, skip: Iterable[str]) -> list[tuple[dataclasses.Field, Any, str]]:
    """Each field, its type and its help."""
    kinds, texts = get_type_hints(settings), documented(settings)
    fields = (field for field in dataclasses.fields(settings) if field.name not in skip)
    return [(field, kinds[field.name], texts.get(field.name, "")) for field in fields]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _parsed(kind: Any) -> Any:
    """What the parser makes a value of this type with: a list is written as 1,8."""
    return _Listed(get_args(kind)[0]) if get_origin(kind) is tuple else kind


def _metavar(kind: Any) -> str:
    """`INT`, `FLOAT`, `INT,...`, `{true,false}` or the choices: what the option takes."""
    if get_origin(kind) is Literal:
        return f"{{{','.join(get_args(kind))}}}"
    if get_origin(kind) is tuple:
        return f"{_metavar(get_args(kind)[0])},..."
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
