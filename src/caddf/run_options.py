"""Options of a training run: how `--config METHOD|FILE` and `--section.setting VALUE` become its settings.

The method is read before all else, since it decides which settings there are. A file's settings are options that come
first on the command line, so that those given besides have the last word.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from caddf.errors import InputError, nearest
from caddf.experiment import DEFAULT_METHOD, METHODS
from caddf.model_settings import ModelSettings
from caddf.running import OWN, RunSettings, ValidationSettings
from caddf.settings import add_section, names_of, parse, section
from caddf.training import TrainConfig


@dataclass(frozen=True)
class Given:
    """What a command line says before its options are known.

    method: a name of `METHODS`. in_files: of each `--config FILE` in turn, its settings by their full names, as they
        are written. others: the arguments but for `--config` and `--method`.
    """

    method: str
    in_files: list[tuple[str, dict[str, str]]]
    others: list[str]


def read_given(arguments: list[str]) -> Given:
    """Reads `--config` and `--method`; raises `InputError` on two methods, one that is not there, or a bad file."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", action="append", default=[])
    first.add_argument("--method")
    try:
        given, others = first.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise InputError(f"{error.argument_name} is given without a value; it names a method or a file") from None
    method, in_files = DEFAULT_METHOD, []
    for config in given.config:
        if config in METHODS:
            if given.method not in (None, config):
                raise InputError(
                    f"method is {given.method} beside config {config}, which is a method already; give one"
                )
            method = config
        else:
            settings = _settings_in(config)
            method = settings.pop("method", method)
            in_files.append((config, settings))
    method = given.method or method
    if method not in METHODS:
        raise InputError(f"method is {method}; it must be one of {', '.join(METHODS)}")
    return Given(method, in_files, others)


def _settings_in(file: str) -> dict[str, str]:
    """The settings of a YAML file by their full names, as the command line would give them."""
    if not Path(file).is_file():
        raise InputError(f"config is {file}; it must be a method ({', '.join(METHODS)}) or a YAML file")
    try:
        # All values as they are written, where YAML would make `off` a false.
        settings = yaml.load(Path(file).read_text(encoding="utf-8"), yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config is {file}, which is not YAML: {error}") from None
    if not isinstance(settings, dict) or "config" in settings:
        raise InputError(f"config is {file}; it must hold lines such as `seed: 1`, and no config of its own")
    return dict(_flat(settings))


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """`train: {steps: 1}` as `train.steps`, `1`; a list as `1,8`."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, ",".join(map(str, value)) if isinstance(value, list) else value


def add_sections(parser: ArgumentParser, method: str) -> None:
    """Options `--SECTION.SETTING` of the sections of `RunSettings`; the objective's are the method's own."""
    add_section(parser, "model", ModelSettings)
    add_section(parser, "objective", METHODS[method].settings, METHODS[method].defaults)
    add_section(parser, "train", TrainConfig, skip=OWN)
    add_section(parser, "validation", ValidationSettings)


def parse_given(parser: ArgumentParser, given: Given) -> Namespace:
    """The values of all options of `parser`, from files and the command line; raises `InputError` as `parse` does."""
    in_files = [(file, name, value) for file, settings in given.in_files for name, value in settings.items()]
    for file, name, _ in in_files:
        _check_name(name, f"{file} has {name}, ", given.method, parser)
    for argument in given.others:
        if (name := argument.partition("=")[0].removeprefix("--")).startswith("objective."):
            _check_name(name, f"{name} is set, ", given.method, parser)
    # The command line has the last word.
    return parse(parser, [*(f"--{name}={value}" for _, name, value in in_files), *given.others])


def _check_name(name: str, said: str, method: str, parser: ArgumentParser) -> None:
    """Raises `InputError`, which begins with `said`, for a setting that is not there with this method."""
    known = names_of(parser)
    if name in known:
        return
    if name.startswith("objective."):
        own = [each.name for each in dataclasses.fields(METHODS[method].settings)]
        has = f"its objective has {', '.join(own)}" if own else "its objective has none"
        raise InputError(f"{said}but the method {method} has no such setting; {has}")
    raise InputError(f"{said}which is no setting{nearest(name, known)}; {parser.prog} --help explains every setting")


def run_settings(method: str, values: Namespace) -> RunSettings:
    """What the values of a run's options decide; raises `InputError` where a section's do not go together."""
    return RunSettings(
        data=values.data,
        method=method,
        init_from=values.init_from,
        device=values.device,
        dtype=values.dtype,
        seed=values.seed,
        model=section(ModelSettings, values.model),
        objective=section(METHODS[method].settings, values.get("objective")),
        train=section(TrainConfig, values.train),
        validation=section(ValidationSettings, values.validation),
    )
