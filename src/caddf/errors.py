"""What a user can get wrong, said in one sentence."""

import functools
from typing import Literal, get_args, get_origin, get_type_hints


class InputError(ValueError):
    """Bad input: the message names the setting, the value, and what would be right. The command line exits with 2."""


def at_least_one(**settings: int) -> None:
    """Raises `InputError` on a setting below 1."""
    for name, value in settings.items():
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")


class Failure(RuntimeError):
    """What went wrong by itself while running: says where, and what to look at. The command line exits with 1."""


@functools.cache
def _choices(kind: type) -> dict[str, tuple[object, ...]]:
    hints = get_type_hints(kind)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


def check_choices(settings: object) -> None:
    """Raises `InputError` on a dataclass's setting that is none of the choices which its type names."""
    kind: type = type(settings)
    for name, choices in _choices(kind).items():
        if (value := getattr(settings, name)) not in choices:
            raise InputError(f"{name} is {value}; it must be one of {', '.join(map(str, choices))}")
