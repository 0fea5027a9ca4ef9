"""`caddf evaluate` and `caddf compare`."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from tempfile import TemporaryDirectory

from jsonargparse import ArgumentParser

from caddf import display
from caddf.checkpoint import read_json
from caddf.commands.options import json_option, model_options
from caddf.data import TokenSet, prepare
from caddf.evaluation import EvaluationConfig
from caddf.evaluation.pairing import comparisons
from caddf.evaluation.protocol import PRESETS, Protocol, preset
from caddf.machine import machine
from caddf.scoring import UNNAMED
from caddf.scoring import evaluate as measure
from caddf.settings import add_options, parse
from caddf.text_model import load


def evaluate(parser: ArgumentParser, arguments: list[str]) -> int:
    """Runs `caddf evaluate` and returns its exit code."""
    parser.add_argument("model", type=str, help="a run, a model folder, or OWNER/NAME on the hub")
    parser.add_argument("--data", type=str, required=True, metavar="SET",
        help="a token set, or a file of text, which is read to its end (tail score) in the model's tokens")  # fmt: skip
    parser.add_argument("--protocol", type=str | None, metavar="NAME",
        help=f"{', '.join(PRESETS)}: what text is cut into and what counts, which single options then change; "
        "not set, caddf's on the validation split")  # fmt: skip
    model_options(parser)
    json_option(parser)
    add_options(parser, Protocol, skip=("name", "seed"))
    add_options(parser, EvaluationConfig, skip=("samples", "max_windows", "seed"))
    base, own = UNNAMED, {field.name for field in dataclasses.fields(Protocol)} - {"name", "seed"}
    parser.set_defaults({name: getattr(base, name) for name in own})
    values = parse(parser, arguments)
    is_text = Path(values.data).is_file()
    if is_text or values.protocol is not None:
        base = preset(values.protocol) if values.protocol else dataclasses.replace(base, tail="score")
        base = dataclasses.replace(base, split="test") if is_text else base
        parser.set_defaults({name: getattr(base, name) for name in own})
        values = parse(parser, arguments)
    settings = EvaluationConfig(**{field.name: values[field.name] for field in dataclasses.fields(EvaluationConfig)})
    protocol = dataclasses.replace(base, **{name: values[name] for name in own})
    data = None if is_text else TokenSet.open(values.data)
    model = load(values.model, device=values.device, dtype=values.dtype, quantize=values.quantize)
    with TemporaryDirectory() as folder, display.bar("evaluating", "windows") as progress:
        if data is None:
            model.tokenizer.save(Path(folder))
            data = prepare(Path(folder) / "set", test=values.data, tokenizer=folder)
        measured = measure(model, data, protocol=protocol, settings=settings, progress=progress)
    made = {"seed": values.seed, "command": shlex.join(["caddf", "evaluate", *arguments]), "machine": machine()}
    result = {"model": values.model, "data": values.data, "split": protocol.split, **measured, **made}
    if values.json:
        print(json.dumps(result))
    else:
        display.evaluation(display.output(), result)
    return 0


def compare(parser: ArgumentParser, arguments: list[str]) -> int:
    """Runs `caddf compare` and returns its exit code."""
    parser.add_argument("ours", type=str, help="what caddf evaluate --json printed")
    parser.add_argument("theirs", type=str, help="the same of another model, on the same windows")
    json_option(parser)
    values = parse(parser, arguments)
    ratios = list(comparisons(*(read_json(Path(file)) for file in (values.ours, values.theirs))))
    if values.json:
        print(json.dumps([dataclasses.asdict(ratio) for ratio in ratios]))
    else:
        display.ratios(display.output(), ratios)
    return 0
