"""What a user can get wrong, said in one sentence."""

import difflib
import functools
import importlib.util
import numbers
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints


class InputError(ValueError):
    """Bad input: the message names the setting, the value, and what would be right. The command line exits with 2."""


def at_least(least: float, of: object = None, /, *names: str, note: str = "", **settings: Any) -> None:
    """Raises `InputError` where one of `names` of the settings `of`, or one of `settings`, is below `least`.

    None passes; of a list each is looked at. `note` is said in brackets.
    """
    _check(lambda value: value >= least, f"be {least} or more", of, names, note, settings)


def a_share(of: object = None, /, *names: str, note: str = "", **settings: Any) -> None:
    """Raises `InputError` where one is not in [0, 1], as `at_least` does where it is below."""
    _check(lambda value: 0 <= value <= 1, "lie in [0, 1]", of, names, note, settings)


def _check(
    holds: Callable[[Any], bool], right: str, of: object, names: Sequence[str], note: str, settings: Mapping[str, Any]
) -> None:
    section = getattr(of, "section", "")
    optional = {section + name for name in names if getattr(type(of), name, 0) is None}
    for name, value in {**{section + name: getattr(of, name) for name in names}, **settings}.items():
        listed = isinstance(value, list | tuple)
        said, subject = ("holds", "each") if listed else ("is", "it")
        for each in value if listed else [value]:
            if each is not None and not holds(each):
                more = (", or not set" if name in optional else "") + (f" ({note})" if note else "")
                raise InputError(f"{name} {said} {each}; {subject} must {right}{more}")


def check_seed(seed: int) -> None:
    """Raises `InputError` for a seed that not every generator takes; rows and processes add their index to it."""
    if not 0 <= seed < 2**62:
        raise InputError(f"seed is {seed}; it must be 0 or more, and less than 2**62")


def once(name: str, values: Sequence[Any]) -> None:
    """Raises `InputError` where `values` has none, or one of them twice."""
    if not values or len({*values}) < len(values):
        said = ",".join(map(str, values))
        raise InputError(f"{name} is {said or 'empty'}; it must hold at least one, and each once")


def installed(package: str, extra: str, who: str) -> None:
    """Raises `InputError` where a package that `who` needs, of that extra, is missing."""
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{package} is not installed; {who} it: pip install 'caddf[{extra}]'")


def nearest(name: str, known: list[str], mark: str = "") -> str:
    """What a name that is not known could mean: ` (did you mean train.steps?)`, or nothing; `mark` goes before each."""
    section, dot, last = name.rpartition(".")
    beside = {each.removeprefix(section + dot): each for each in known if each.startswith(section + dot)}
    if not beside:  # the section is misspelt too
        found = difflib.get_close_matches(name, known, cutoff=0.8)
    else:
        found = [each for each in known if each.endswith(f".{name}") or each.startswith(f"{name}.")]
        found = found or [beside[each] for each in difflib.get_close_matches(last, beside)]
    return f" (did you mean {' or '.join(mark + each for each in found[:3])}?)" if found else ""


class Failure(RuntimeError):
    """What went wrong by itself while running: says where, and what to look at. The command line exits with 1."""


class Checked:
    """A dataclass of settings, each of which must be what its field's type says; else `InputError` names it."""

    section: ClassVar[str] = ""
    """What options of these settings begin with, as in `train.`."""

    def __post_init__(self) -> None:
        kind: Any = type(self)
        check_types(_hints(kind), vars(self), self.section)


def check_arguments(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raises `InputError` on one of the arguments `given` to `function` that is not what its annotation says."""
    check_types(_hints(function), given)


def check_types(hints: Mapping[str, Any], values: Mapping[str, Any], section: str = "") -> None:
    """Raises `InputError` on one of `values` that is not of its type in `hints`; those without a type are passed over.

    A whole number is a number, and true or false is neither; a list stands for a tuple.
    """
    for name, value in values.items():
        if name in hints and not _is(value, hints[name]):
            right = _said(hints[name])
            shown = value if isinstance(value, str) and right.startswith("one of") else _shown(value)
            raise InputError(f"{section}{name} is {shown}; it must be {right}")


@functools.cache
def _hints(of: Any) -> dict[str, Any]:
    return get_type_hints(of)


def _is(value: Any, hint: Any) -> bool:
    kind, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if kind is Literal:
        return any(value is part or (isinstance(value, str) and value == part) for part in parts)
    if kind in (Union, UnionType):
        return any(_is(value, part) for part in parts)
    if kind in (tuple, Sequence):
        several = tuple | list if kind is tuple else Sequence
        return (
            isinstance(value, several) and not isinstance(value, str | bytes) and all(_is(v, parts[0]) for v in value)
        )
    if hint in (int, float):
        number = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    if kind is Callable:
        return callable(value)
    if isinstance(array := getattr(hint, "array_type", None), type):
        return isinstance(value, array)  # of any shape
    return isinstance(value, hint) if isinstance(hint, type) and not getattr(hint, "_is_protocol", False) else True


def _said(hint: Any) -> str:
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if kind in (Union, UnionType):
        return " or ".join(_said(part) for part in parts if part is not NoneType)
    if kind in (tuple, Sequence):
        return f"a list, each {_said(parts[0])}"
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    article = "an" if hint.__name__[0] in "AEIOU" else "a"
    return plain.get(hint, f"{article} {hint.__name__}")


def _shown(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 60 and "\n" not in said else f"a {type(value).__name__}"
