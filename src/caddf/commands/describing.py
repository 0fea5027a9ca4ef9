"""`caddf info` and `caddf methods`."""

from __future__ import annotations

import json

import torch
from jsonargparse import ArgumentParser

from caddf import display
from caddf.commands.options import json_option
from caddf.errors import InputError
from caddf.experiment import DEFAULT_METHOD, METHODS, network_of
from caddf.model_settings import ModelSettings
from caddf.models.accounts import accounts
from caddf.settings import add_section, parse, section
from caddf.text_model import describe_folder, model_folder


def info(parser: ArgumentParser, arguments: list[str]) -> int:
    """Runs `caddf info` and returns its exit code."""
    parser.add_argument("run", type=str | None, nargs="?", help="a run, a model folder, or a hub name")
    parser.add_argument("--config", type=str, default=DEFAULT_METHOD, metavar="METHOD",
        help=f"without a run: one of {', '.join(METHODS)}")  # fmt: skip
    parser.add_argument("--vocab-size", type=int | None, metavar="INT",
        help="tokens of the vocabulary, without a run; not set, the preset's")  # fmt: skip
    json_option(parser)
    add_section(parser, "model", ModelSettings)
    values = parse(parser, arguments)
    if values.run is None:
        if values.config not in METHODS:
            raise InputError(f"config is {values.config!r}; it must be a method: {', '.join(METHODS)}")
        settings, method = section(ModelSettings, values.model), METHODS[values.config]
        vocab_size = settings.preset.vocab_size if values.vocab_size is None else values.vocab_size
        config = method.configure(settings, vocab_size, 0)
        about = {"method": values.config, "architecture": method.architecture, "size": settings.size}
        about["model"] = config.to_dict()
    elif any(argument.startswith(("--model.", "--vocab-size", "--config")) for argument in arguments):
        raise InputError(f"run is {values.run}, beside settings of a model; a run has its own: give one or the other")
    else:
        about = describe_folder(model_folder(values.run))
    with torch.device("meta"):
        model = network_of(about)
    result = {**about, **accounts(model)}
    if values.json:
        print(json.dumps(result))
    else:
        display.info(display.output(), result)
    return 0


def methods(parser: ArgumentParser, arguments: list[str]) -> int:
    """Runs `caddf methods` and returns its exit code."""
    json_option(parser)
    values = parse(parser, arguments)
    columns = ("objective", "likelihood", "sampler", "decoder", "source")
    rows = {name: {column: getattr(method, column) for column in columns} for name, method in METHODS.items()}
    if values.json:
        print(json.dumps(rows))
    else:
        display.methods(display.output(), rows)
    return 0
