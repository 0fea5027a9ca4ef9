"""The command line: verbs that parse, call and print. Results go to standard output, all else to standard error."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from rich.console import Console

from caddf import display
from caddf.checkpoint import load_model_config
from caddf.data import TokenSet, prepare
from caddf.decoding import DECODERS
from caddf.errors import InputError
from caddf.evaluation import EvaluationConfig
from caddf.experiment import DEFAULT_METHOD, METHODS, DType, ModelSettings, load, model_folder
from caddf.generation import generate
from caddf.models.backbone import DualBranch
from caddf.models.config import ModelConfig
from caddf.running import OWN, RunSettings, TrainingDType, ValidationSettings, resume, start
from caddf.scoring import evaluate, windows_of
from caddf.settings import add_options, add_section, options, section
from caddf.training import TrainConfig, TrainingError
from caddf.training.config import Device

_LITERAL = re.compile(r'Parser key "([^"]+)": Expected a typing\.Literal\[(.*)\]\. Got value: (.*)')


@dataclass(frozen=True)
class Verb:
    """A command: what `caddf --help` says of it, and what runs it with the arguments behind it."""

    about: str
    run: Callable[[list[str]], int]


def main(argv: list[str] | None = None) -> int:
    """Runs `caddf VERB ...`; 0 is success, 1 a failure while running, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    words = 2 if arguments[:1] == ["data"] else 1
    name = " ".join(arguments[:words])
    if not arguments or name in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if name == "--version":
        from importlib.metadata import version

        print(version("caddf"))
        return 0
    try:
        if name not in VERBS:
            raise InputError(f"there is no command {name!r}; the commands are {', '.join(VERBS)}")
        return VERBS[name].run(arguments[words:])
    except (InputError, ArgumentError) as error:
        print(f"caddf: error: {_sentence(error)}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"caddf: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        print("caddf: interrupted", file=sys.stderr)
        return 130


def _usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  caddf {name:<{width}}  {verb.about}" for name, verb in VERBS.items()]
    return "\n".join(
        ["usage: caddf COMMAND [OPTIONS]", "", *lines, "", "caddf COMMAND --help lists a command's options."]
    )


def _sentence(error: Exception) -> str:
    text = " ".join(str(error.message if isinstance(error, ArgumentError) else error).split())
    if match := _LITERAL.match(text):
        return f"{match[1]} is {match[3]}; it must be one of {match[2].replace(chr(39), '')}"
    return text


def _parser(verb: str) -> ArgumentParser:
    return ArgumentParser(prog=f"caddf {verb}", description=VERBS[verb].about, exit_on_error=False)


def _parse(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    try:
        return parser.parse_args(arguments)
    except ArgumentError as error:
        if isinstance(cause := error.__cause__ or error.__context__, InputError):
            raise cause from None
        raise


def _model_options(parser: ArgumentParser, default_dtype: str = "float32") -> None:
    parser.add_argument("--device", type=str, default="auto", help="auto (a GPU where there is one), cpu, cuda or mps")
    parser.add_argument("--dtype", type=DType, default=default_dtype, help="of weights and arithmetic")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--json", action="store_true", help="print one JSON value on standard output")


def _print(as_json: bool, values: Any, table: Callable[[Console, Any], None]) -> None:
    if as_json:
        print(json.dumps(values))
    else:
        table(Console(), values)


def _data_prepare(arguments: list[str]) -> int:
    parser = _parser("data prepare")
    source = "text, JSONL (.gz, .xz, .zst too), parquet, a folder, stdlib, or hf:NAME[:CONFIG][@SPLIT]"
    add = parser.add_argument
    add("--input", type=str | None, default=None, help=f"documents to split 90/5/5: {source}")
    for name in ("train", "validation", "test"):
        add(f"--{name}", type=str | None, default=None, help=f"documents of the {name} split, likewise")
    add("--out", type=str, required=True, help="folder of the token set")
    add("--tokenizer", type=str, default="bpe:8192", help="bpe:N, bytes, gpt2, gpt2:FOLDER, or a saved tokenizer")
    add("--column", type=str, default="text", help="where JSONL, parquet and data sets keep the text")
    add("--streaming", action="store_true", help="read a data set without storing it")
    add("--max-documents", type=int | None, default=None, help="read no more documents of each source")
    add("--seed", type=int, default=0, help="of the split")
    add("--overwrite", action="store_true", help="replace a token set")
    values = vars(_parse(parser, arguments))
    if values["input"] is None and values["train"] is None:
        raise InputError(
            "neither input nor train is given; give --input FILE, or --train FILE (--input stdlib needs no file)"
        )
    out = values.pop("out")
    with display.stages() as progress:
        token_set = prepare(out, progress=progress, **values)
    display.token_set(Console(), token_set)
    return 0


def _train(arguments: list[str]) -> int:
    console = Console(stderr=True)
    method, arguments = _method(arguments)
    chosen = METHODS[method]
    parser = _parser("train")
    add = parser.add_argument
    add("--config", action="config", help=f"a method ({', '.join(METHODS)}) or a YAML file of settings")
    add("--method", type=str, default=method, help="the method, in a YAML file")
    add("--data", type=str | None, default=None, help="a token set; caddf data prepare makes one")
    add("--out", type=str | None, default=None, help="the run's folder, which must not exist")
    add("--resume", type=str | None, default=None, help="a run to go on with, with its own settings")
    add(
        "--init_from", type=str | None, default=None, help="a run, model folder or hub name whose weights to start from"
    )
    add("--device", type=Device, default="auto", help="auto (a GPU where there is one), cpu, cuda or mps")
    add("--dtype", type=TrainingDType, default="auto",
        help="of the passes; bfloat16 is autocast over float32 weights; auto takes it where it is fast")  # fmt: skip
    add("--seed", type=int, default=0, help="of the weights, the order of the data, and all draws")
    add_section(parser, "model", ModelSettings)
    add_section(parser, "objective", chosen.settings, chosen.defaults)
    add_section(parser, "train", TrainConfig, skip=OWN)
    add_section(parser, "validation", ValidationSettings)
    values = _parse(parser, arguments)
    if values.resume is not None:
        if len(arguments) > 2:
            raise InputError(
                "resume is given with other settings; a run goes on with its own: caddf train --resume RUN"
            )
        result = resume(Path(values.resume), console)
        if result.finished_before:
            console.print(f"{values.resume} is finished: all {result.step} steps are done")
            return 0
    else:
        for name in ("data", "out"):
            if values[name] is None:
                raise InputError(f"{name} is not given; caddf train needs --data SET and --out RUN (or --resume RUN)")
        settings = RunSettings(
            data=values.data,
            method=method,
            init_from=values.init_from,
            device=values.device,
            dtype=values.dtype,
            seed=values.seed,
            model=section(ModelSettings, values.model),
            objective=section(chosen.settings, values.objective),
            train=section(TrainConfig, values.train),
            validation=section(ValidationSettings, values.validation),
        )
        result = start(settings, Path(values.out), console)
    if result.interrupted:
        return 0
    best = (
        ""
        if result.best_nll is None
        else f"; best validation {result.best_nll:.4f} nats/token at step {result.best_step}"
    )
    console.print(
        f"done: {result.step} steps, {result.tokens:,} tokens, {result.elapsed:.0f} s{best}; {result.checkpoint}"
    )
    return 0


def _method(arguments: list[str]) -> tuple[str, list[str]]:
    """The method that `--config` names, itself or in its file; its name is gone from the arguments that are left."""
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name != "--config":
            continue
        value = value if equals else "".join(arguments[i + 1 : i + 2])
        if value in METHODS:
            return value, arguments[:i] + arguments[i + (1 if equals else 2) :]
        if not Path(value).is_file():
            raise InputError(f"config is {value!r}; it must be a method ({', '.join(METHODS)}) or a YAML file")
        try:
            settings = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"config is {value}, which is not YAML: {error}") from None
        method = settings.get("method", DEFAULT_METHOD) if isinstance(settings, dict) else None
        if method not in METHODS:
            raise InputError(f"method is {method!r} in {value}; it must be one of {', '.join(METHODS)}")
        return method, arguments
    return DEFAULT_METHOD, arguments


def _evaluate(arguments: list[str]) -> int:
    parser = _parser("evaluate")
    parser.add_argument("model", type=str, help="a run, a model folder, or OWNER/NAME on the hub")
    parser.add_argument("--data", type=str, required=True, help="a token set")
    parser.add_argument("--split", type=str, default="validation", help="train, validation or test")
    _model_options(parser)
    parser.add_argument("--block-size", type=int | None, default=None, help="k; not set, the model's own")
    add_options(parser, EvaluationConfig, skip=("seed", "block_size"))
    values = _parse(parser, arguments)
    data = TokenSet.open(values.data)
    model = load(values.model, device=values.device, dtype=values.dtype)
    block_size = values.block_size or model.model.block_size
    settings = EvaluationConfig(**{**options(EvaluationConfig, values), "block_size": block_size, "seed": values.seed})
    windows = windows_of(model, data, values.split)
    with display.bar("evaluating", "windows") as progress:
        result = evaluate(model, windows, settings=settings, progress=progress)
    result = {"model": values.model, "data": values.data, "split": values.split, **result, "seed": values.seed}
    _print(values.json, result, display.evaluation)
    return 0


def _generate(arguments: list[str]) -> int:
    parser = _parser("generate")
    add = parser.add_argument
    add("model", type=str, help="a run, a model folder, or OWNER/NAME on the hub")
    add("--prompt", type=str, action="append", help="text to continue; again for a batch")
    add("--template", type=str, action="append", help='text with holes to fill, "def f(x):[MASK:24]return y"')
    add("--decoder", type=str, default="speculative", help=", ".join(DECODERS))
    add("--max-new-tokens", type=int, default=64, help="length of a continuation")
    add("--temperature", type=float, default=1.0, help="0 is greedy")
    add("--top-k", type=int, default=0, help="draw from the k most probable tokens; 0 is off")
    add("--top-p", type=float, default=1.0, help="draw from the fewest tokens that hold this probability; 1 is off")
    add("--min-p", type=float, default=0.0, help="drop tokens below this share of the most probable one; 0 is off")
    add("--stop", type=str, action="append", help="text that ends a row; again for more")
    add("--batch", type=int, default=1, help="rows for a single prompt or template; row r draws from seed + r")
    add("--show", action="store_true", help="show the canvas as it fills")
    _model_options(parser)
    for decoder in DECODERS.values():
        add_options(parser, decoder, skip=("until",), unset=True)
    values = _parse(parser, arguments)
    texts = {name: values[name] for name in ("prompt", "template") if values[name] is not None}
    if values.batch < 1:
        raise InputError(f"batch is {values.batch}; it must be at least 1")
    if values.batch > 1:
        if sum(map(len, texts.values())) != 1:
            raise InputError(f"batch is {values.batch}, which repeats one prompt or template; give exactly one")
        texts = {name: given * values.batch for name, given in texts.items()}
    settings: dict[str, Any] = {}
    for decoder in DECODERS.values():
        settings |= options(decoder, values)
    settings.pop("until", None)
    model = load(values.model, device=values.device, dtype=values.dtype)
    frames = generate(
        model,
        **texts,
        decoder=values.decoder,
        max_new_tokens=values.max_new_tokens,
        temperature=values.temperature,
        top_k=values.top_k,
        top_p=values.top_p,
        min_p=values.min_p,
        seed=values.seed,
        stop=values.stop or (),
        **settings,
    )
    last = display.watch(frames, live=values.show)
    results = last.results()
    _print(values.json, results[0] if len(results) == 1 else results, display.generation)
    return 0


def _info(arguments: list[str]) -> int:
    parser = _parser("info")
    parser.add_argument("run", type=str | None, nargs="?", default=None, help="a run, a model folder, or a hub name")
    parser.add_argument("--vocab-size", type=int | None, default=None, help="V, without a run; not set, the preset's")
    parser.add_argument("--json", action="store_true", help="print one JSON value on standard output")
    add_section(parser, "model", ModelSettings)
    values = _parse(parser, arguments)
    if values.run is not None:
        about = load_model_config(model_folder(values.run))
        config = ModelConfig.from_dict(about.pop("model"))
    else:
        settings = section(ModelSettings, values.model)
        about = {"size": settings.size}
        config = settings.config(values.vocab_size or settings.preset.vocab_size, bos_id=0)
    with torch.device("meta"):
        model = DualBranch(config)
    _print(values.json, {**about, **model.accounts()}, display.info)
    return 0


VERBS = {
    "data prepare": Verb("turn text into a token set", _data_prepare),
    "train": Verb("train a model, or go on with a run", _train),
    "evaluate": Verb("likelihoods, bounds and accuracies with standard errors", _evaluate),
    "generate": Verb("continue a prompt, or fill the holes of a template", _generate),
    "info": Verb("parameters, floating-point operations and memory of a model", _info),
}
