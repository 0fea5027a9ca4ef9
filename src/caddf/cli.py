"""The command line: verbs that parse, call and print. Results go to standard output, all else to standard error."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.console import Console

from caddf import benchmarks, display
from caddf.benchmarks.results import Results
from caddf.checkpoint import check_writable, installed_version, named, read_json, write_json_atomic
from caddf.compile import Compile
from caddf.data import TokenSet, prepare
from caddf.data.named import NAMED
from caddf.decoding import DECODERS
from caddf.decoding.task import DecodingError
from caddf.errors import InputError
from caddf.evaluation import EvaluationConfig
from caddf.evaluation.pairing import comparisons
from caddf.evaluation.protocol import PRESETS, Protocol, preset
from caddf.experiment import DEFAULT_METHOD, METHODS, ModelSettings, network_of
from caddf.export import ExportSettings, export
from caddf.generation import NEW, generate
from caddf.machine import machine
from caddf.models.accounts import accounts
from caddf.quantise import Quantisation
from caddf.report import report
from caddf.reproduce import TABLES, ReproduceSettings, reproduce
from caddf.run_options import add_sections, parse_given, read_given, run_settings
from caddf.running import TrainingDType, resume, start
from caddf.samples import Recording, SamplesSettings, collect_samples
from caddf.scoring import UNNAMED, evaluate
from caddf.settings import add_choices, add_options, add_section, new_parser, options, parse, section
from caddf.text_model import DType, check_seed, describe_folder, load, model_folder
from caddf.training import TrainingError
from caddf.training.config import Device

GROUPS = ("data", "benchmark")
"""First words of commands that are two."""
INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM, as shells have it."""


@dataclass(frozen=True)
class Verb:
    """A command: its arguments and what it does, for `--help`, and what runs it with the arguments behind it."""

    takes: str
    about: str
    run: Callable[[ArgumentParser, list[str]], int]


def main(argv: list[str] | None = None) -> int:
    """Runs `caddf VERB ...`; 0 is success, 1 a failure while running, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if argv is None else argv
    group = arguments[0] if arguments and arguments[0] in GROUPS else ""
    words = 2 if group else 1
    name = " ".join(arguments[:words])
    try:
        if name.removeprefix(group).strip() in ("", "-h", "--help", "help"):
            print(_usage(group), flush=True)
            return 0
        if name == "--version":
            print(installed_version())
            return 0
        if name not in VERBS:
            raise InputError(f"there is no command {name!r}; the commands are {', '.join(_verbs(group))}")
        verb = VERBS[name]
        return verb.run(new_parser(f"caddf {name}", verb.takes, verb.about), arguments[words:])
    except InputError as error:
        print(f"caddf: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        print(f"caddf: error: {named(error.filename)} cannot be used: {error.strerror}", file=sys.stderr)
        return 2
    except (TrainingError, DecodingError) as error:
        print(f"caddf: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("caddf: interrupted", file=sys.stderr)
        return INTERRUPTED


def _verbs(group: str) -> dict[str, Verb]:
    """The commands of a group, or all of them."""
    return {name: verb for name, verb in VERBS.items() if not group or name.startswith(f"{group} ")}


def _usage(group: str) -> str:
    verbs, command = _verbs(group), f"caddf {group} COMMAND".replace("  ", " ")
    width = max(map(len, verbs))
    lines = [f"  caddf {name:<{width}}  {verb.about}" for name, verb in verbs.items()]
    return "\n".join([f"usage: {command} [OPTIONS]", "", *lines, "", f"{command} --help lists a command's options."])


def _model_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", type=str, default="auto", help="auto (a GPU where there is one), cpu, cuda or mps")
    add("--dtype", type=DType, default="float32", help="of weights and arithmetic")
    add("--quantize", type=Quantisation | None, metavar="{int8,bf16}",
        help="weights of fewer bytes for decoding, on a CPU")  # fmt: skip
    add("--seed", type=int, default=0, metavar="INT", help="of all that is drawn")


def _json_option(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON value on standard output, and no table")


def _data_prepare(parser: ArgumentParser, arguments: list[str]) -> int:
    source = (
        "text, JSONL (.gz, .xz, .zst too), parquet, a folder, stdlib[:BYTES], hf:NAME[:CONFIG][@SPLIT], or a data set: "
        + ", ".join(NAMED)
    )
    add = parser.add_argument
    add("--input", type=str | None, metavar="SOURCE",
        help=f"documents to split 90/5/5 (a data set that has splits of its own keeps them): {source}")  # fmt: skip
    for name in ("train", "validation", "test"):
        add(f"--{name}", type=str | None, metavar="SOURCE", help=f"documents of the {name} split, instead of --input")
    add("--out", type=str, required=True, metavar="SET", help="folder of the token set")
    add("--tokenizer", type=str, default="bpe:8192", metavar="NAME",
        help="bpe:N (N tokens, learnt from the training documents), bytes, gpt2, gpt2:FOLDER, or a folder that holds "
        "tokenizer.json: a token set, a model")  # fmt: skip
    add("--data-root", type=str | None, metavar="FOLDER", help="of local copies of data sets by name")
    add("--column", type=str, default="text", metavar="NAME", help="where JSONL, parquet and data sets keep the text")
    add("--streaming", action="store_true", help="read a data set without storing it")
    add("--max-documents", type=int | None, metavar="INT", help="read no more documents of each source")
    add("--seed", type=int, default=0, metavar="INT", help="of the split")
    add("--overwrite", action="store_true", help="replace the token set, if it is there")
    values = vars(parse(parser, arguments))
    out = values.pop("out")
    with display.stages() as progress:
        token_set = prepare(out, progress=progress, **values)
    if values["tokenizer"].startswith("bpe:") and token_set.tokenizer.name != values["tokenizer"]:
        print(f"the text is too short for {values['tokenizer']}: it gave {token_set.tokenizer.name}", file=sys.stderr)
    display.token_set(display.output(), token_set)
    return 0


def _train(parser: ArgumentParser, arguments: list[str]) -> int:
    given = read_given(arguments)
    add = parser.add_argument
    add("--config", type=str | None, metavar="METHOD|FILE",
        help=f"a method ({', '.join(METHODS)}), or a YAML file of settings, named as here: `seed: 1`, "
        "`train: {steps: 100}`; options given besides have the last word. --help then lists its settings")  # fmt: skip
    add("--method", type=str | None, help="the method, where --config is a file")
    add("--data", type=str | None, metavar="SET", help="a token set; caddf data prepare makes one")
    add("--out", type=str | None, metavar="RUN", help="the run's folder, which must not exist")
    add(
        "--resume",
        type=str | None,
        metavar="RUN",
        help="a run to go on with, with its own settings; --data and --device may say where it goes on",
    )
    add("--init-from", "--init_from", type=str | None, metavar="MODEL",
        help="weights to start with: of a run, model folder or hub name; a GPT-2's, for the causal branch")  # fmt: skip
    add("--device", type=Device, default="auto", help="auto (a GPU where there is one), cpu, cuda or mps")
    add("--dtype", type=TrainingDType, default="auto",
        help="of the passes; bfloat16 is autocast over float32 weights; auto takes it where it is fast")  # fmt: skip
    add("--seed", type=int, default=0, metavar="INT", help="of the weights, the order of the data, and all draws")
    add_sections(parser, given.method)
    values = parse_given(parser, given)
    console = Console(stderr=True)
    if values.resume is not None:
        named = {argument.partition("=")[0] for argument in arguments if argument.startswith("-")}
        if named - {"--resume", "--data", "--device"}:
            raise InputError(
                f"resume is {values.resume}, beside other settings; a run goes on with its own, but for --data, where "
                f"its data lies by now, and --device: caddf train --resume {values.resume} (a new run with other "
                f"settings can begin with its weights: --init-from {values.resume})"
            )
        device = values.device if "--device" in named else None
        result = resume(Path(values.resume), console, data=values.data, device=device)
    else:
        for name in ("data", "out"):
            if values[name] is None:
                raise InputError(f"{name} is not given; caddf train needs --data SET and --out RUN (or --resume RUN)")
        result = start(run_settings(given.method, values), Path(values.out), console)
    if result.interrupted:
        return INTERRUPTED
    if result.finished_before:
        print(f"{values.resume} is finished: all {result.step} steps are done", file=sys.stderr)
        return 0
    best = ""
    if result.best_nll is not None:
        best = f"; best validation {result.best_nll:.4f} nats/token at step {result.best_step}"
    took = f"{result.step} steps, {result.tokens:,} tokens, {result.elapsed:.0f} s"
    print(f"done: {took}{best}; {result.checkpoint}", file=sys.stderr)
    return 0


def _evaluate(parser: ArgumentParser, arguments: list[str]) -> int:
    parser.add_argument("model", type=str, help="a run, a model folder, or OWNER/NAME on the hub")
    parser.add_argument("--data", type=str, required=True, metavar="SET", help="a token set")
    parser.add_argument("--protocol", type=str | None, metavar="NAME",
        help=f"{', '.join(PRESETS)}: what text is cut into and what counts, which single options then change; "
        "not set, caddf's on the validation split")  # fmt: skip
    _model_options(parser)
    _json_option(parser)
    add_options(parser, Protocol, skip=("name", "seed"))
    add_options(parser, EvaluationConfig, skip=("samples", "max_windows", "seed"))
    base, own = UNNAMED, {field.name for field in dataclasses.fields(Protocol)} - {"name", "seed"}
    parser.set_defaults({name: getattr(base, name) for name in own})
    values = parse(parser, arguments)
    if values.protocol is not None:
        base = preset(values.protocol)
        parser.set_defaults({name: getattr(base, name) for name in own})
        values = parse(parser, arguments)
    settings = EvaluationConfig(**{field.name: values[field.name] for field in dataclasses.fields(EvaluationConfig)})
    protocol = dataclasses.replace(base, **{name: values[name] for name in own})
    data = TokenSet.open(values.data)
    model = load(values.model, device=values.device, dtype=values.dtype, quantize=values.quantize)
    with display.bar("evaluating", "windows") as progress:
        measured = evaluate(model, data, protocol=protocol, settings=settings, progress=progress)
    made = {"seed": values.seed, "command": shlex.join(["caddf", "evaluate", *arguments]), "machine": machine()}
    result = {"model": values.model, "data": values.data, "split": protocol.split, **measured, **made}
    if values.json:
        print(json.dumps(result))
    else:
        display.evaluation(display.output(), result)
    return 0


def _compare(parser: ArgumentParser, arguments: list[str]) -> int:
    parser.add_argument("ours", type=str, help="what caddf evaluate --json printed")
    parser.add_argument("theirs", type=str, help="the same of another model, on the same windows")
    _json_option(parser)
    values = parse(parser, arguments)
    ratios = list(comparisons(*(read_json(Path(file)) for file in (values.ours, values.theirs))))
    if values.json:
        print(json.dumps([dataclasses.asdict(ratio) for ratio in ratios]))
    else:
        display.ratios(display.output(), ratios)
    return 0


def _generate(parser: ArgumentParser, arguments: list[str]) -> int:
    add = parser.add_argument
    add("model", type=str, help="a run, a model folder, or OWNER/NAME on the hub")
    add("--prompt", type=str, action="append", metavar="TEXT", help="text to continue; again for a batch")
    add("--template", type=str, action="append", metavar="TEXT",
        help="text with holes to fill, 'def f(x):[MASK:24]return y'; again for a batch")  # fmt: skip
    add("--decoder", type=str | None, metavar="NAME",
        help=f"{', '.join(DECODERS)}; not set, the method's (CAD-DF: speculative)")  # fmt: skip
    for name, kind, default, text in (
        ("temperature", float, 1.0, "0 is greedy"),
        ("top-k", int, 0, "draw from the k most probable tokens; 0 is off"),
        ("top-p", float, 1.0, "draw from the fewest tokens that hold this probability; 1 is off"),
        ("min-p", float, 0.0, "drop tokens below this share of the most probable one; 0 is off"),
    ):
        add(f"--{name}", type=kind, default=default, metavar=kind.__name__.upper(), help=text)
    add(
        "--max-new-tokens", type=int | None, metavar="INT", help=f"length of a prompt's continuation, in tokens ({NEW})"
    )
    add("--stop", type=str, action="append", metavar="TEXT", help="text that ends a prompt's row; again for more")
    add("--batch", type=int, default=1, metavar="INT",
        help="rows for a single prompt or template; row r draws from seed + r")  # fmt: skip
    add("--show", action="store_true", help="show the canvas as it fills")
    add("--record", type=str | None, metavar="FILE", help="keep every frame as JSON, for caddf report")
    _model_options(parser)
    add("--compile", type=Compile, default="auto", metavar="{auto,always,never}",
        help="decoding by compiled kernels on a CPU, CUDA graphs on a GPU; auto: where the model suits")  # fmt: skip
    _json_option(parser)
    add_choices(parser, "settings of some decoders; not set, the decoder's own default", DECODERS, skip=("until",))
    values = parse(parser, arguments)
    if values.batch < 1:
        raise InputError(f"batch is {values.batch}; it must be at least 1")
    if values.record is not None:
        check_writable("record", values.record)
    texts = {name: values[name] for name in ("prompt", "template") if values[name] is not None}
    if values.batch > 1 and sum(map(len, texts.values())) != 1:
        raise InputError(f"batch is {values.batch}, which repeats one prompt or template; give exactly one")
    settings: dict[str, Any] = {}
    for decoder in DECODERS.values():
        settings |= options(decoder, values)
    model = load(
        values.model, device=values.device, dtype=values.dtype, quantize=values.quantize, compile=values.compile
    )
    frames = generate(
        model,
        **{name: given * values.batch for name, given in texts.items()},
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
    if values.record is not None:
        recording = Recording()
        last = display.watch(recording.of(frames), values.show)
        recording.save(
            Path(values.record), model=Path(values.model).name, decoder=values.decoder or model.decoder,
            seed=values.seed, command=shlex.join(["caddf", "generate", *arguments]),
        )  # fmt: skip
    else:
        last = display.watch(frames, values.show)
    if values.json:
        results = last.results()
        print(json.dumps(results[0] if len(results) == 1 else results))
    else:
        display.generation(display.output(), last)
    return 0


def _info(parser: ArgumentParser, arguments: list[str]) -> int:
    parser.add_argument("run", type=str | None, nargs="?", help="a run, a model folder, or a hub name")
    parser.add_argument("--config", type=str, default=DEFAULT_METHOD, metavar="METHOD",
        help=f"without a run: one of {', '.join(METHODS)}")  # fmt: skip
    parser.add_argument("--vocab-size", type=int | None, metavar="INT",
        help="tokens of the vocabulary, without a run; not set, the preset's")  # fmt: skip
    _json_option(parser)
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


def _methods(parser: ArgumentParser, arguments: list[str]) -> int:
    _json_option(parser)
    values = parse(parser, arguments)
    columns = ("objective", "likelihood", "sampler", "decoder", "source")
    rows = {name: {column: getattr(method, column) for column in columns} for name, method in METHODS.items()}
    if values.json:
        print(json.dumps(rows))
    else:
        display.methods(display.output(), rows)
    return 0


def _benchmark(
    settings: type, measure: Callable[[Any, Console], Results]
) -> Callable[[ArgumentParser, list[str]], int]:
    """A verb that measures, leaves a folder of results and prints its table."""

    def run(parser: ArgumentParser, arguments: list[str]) -> int:
        _json_option(parser)
        add_options(parser, settings)
        values = parse(parser, arguments)
        results = measure(settings(**options(settings, values)), Console(stderr=True))
        text = json.dumps(results.values) + "\n" if values.json else results.markdown.read_text(encoding="utf-8")
        print(text, end="")
        return 0

    return run


def _reproduce(parser: ArgumentParser, arguments: list[str]) -> int:
    parser.add_argument("table", type=str, help=f"one of {', '.join(TABLES)}")
    add_options(parser, ReproduceSettings)
    values = parse(parser, arguments)
    settings = ReproduceSettings(**options(ReproduceSettings, values))
    check_seed(settings.seed)
    out = reproduce(values.table, settings, Console(stderr=True))
    if (out / "table.md").exists():
        print((out / "table.md").read_text(encoding="utf-8"), end="")
    return 0


def _export(parser: ArgumentParser, arguments: list[str]) -> int:
    add = parser.add_argument
    add("model", type=str, help="a run (its latest checkpoint), one of its checkpoints, or a model folder")
    add("--out", type=str, required=True, metavar="FOLDER", help="the new model folder")
    add("--evaluations", type=str, nargs="+", metavar="FILE",
        help="results of caddf evaluate --json, whose perplexities the card shows")  # fmt: skip
    add("--overwrite", action="store_true", help="replace the folder, if it is there")
    add_options(parser, ExportSettings, skip=("out", "evaluations", "overwrite"))
    values = parse(parser, arguments)
    values.evaluations = tuple(values.evaluations or ())
    out = export(values.model, ExportSettings(**options(ExportSettings, values)))
    print(f"{out}: {(out / 'model.safetensors').stat().st_size / 1e6:.1f} MB of weights", flush=True)
    return 0


def _samples(parser: ArgumentParser, arguments: list[str]) -> int:
    add = parser.add_argument
    add("--models", type=str, required=True, metavar="RUNS",
        help="NAME=RUN,... or a folder of runs; the first sets the unit of cost")  # fmt: skip
    add("--prompt", type=str, action="append", required=True, metavar="TEXT", help="text to continue; again for more")
    add("--out", type=str, default="results/samples", metavar="FOLDER", help="where samples.json is written")
    add_options(parser, SamplesSettings, skip=("models",))
    values = parse(parser, arguments)
    settings = SamplesSettings(**options(SamplesSettings, values))
    check_seed(settings.seed)
    out = Path(values.out)
    check_writable("out", out / "samples.json")
    samples = collect_samples(values.prompt, settings, Console(stderr=True))
    out.mkdir(parents=True, exist_ok=True)
    write_json_atomic(out / "samples.json", {**samples, "command": shlex.join(["caddf", "samples", *arguments])})
    print(out / "samples.json")
    return 0


def _report(parser: ArgumentParser, arguments: list[str]) -> int:
    parser.add_argument("results", type=str, help="a folder of result files, at any depth")
    parser.add_argument("-o", "--out", type=str, default="report.html", metavar="FILE", help="the page")
    values = parse(parser, arguments)
    check_writable("out", values.out)
    shown = report(Path(values.results), Path(values.out))
    for link, why in shown.unread.items():
        print(f"not shown: {link}: {why}", file=sys.stderr)
    print(values.out)
    return 0


VERBS = {
    "data prepare": Verb(
        "--input SOURCE | --train SOURCE [--validation SOURCE] [--test SOURCE] --out SET [OPTIONS]",
        "turn text into a token set",
        _data_prepare,
    ),
    "train": Verb(
        "[--config METHOD|FILE] --data SET --out RUN [OPTIONS] | --resume RUN",
        "train a model, or go on with a run",
        _train,
    ),
    "evaluate": Verb(
        "MODEL --data SET [OPTIONS]", "likelihoods, bounds and accuracies with standard errors", _evaluate
    ),
    "compare": Verb(
        "OURS.json THEIRS.json [--json]", "two models' perplexities on the same windows, as paired ratios", _compare
    ),
    "generate": Verb(
        "MODEL --prompt TEXT | --template TEXT [OPTIONS]",
        "continue a prompt, or fill the holes of a template",
        _generate,
    ),
    "benchmark decode": Verb(
        "[OPTIONS]",
        "tokens a second, passes, caches and memory of every decoder, and what the text is worth",
        _benchmark(benchmarks.DecodeSettings, benchmarks.decode),
    ),
    "benchmark train": Verb(
        "[OPTIONS]",
        "a training step against plain PyTorch with full logits: speed and memory",
        _benchmark(benchmarks.TrainSettings, benchmarks.train),
    ),
    "benchmark scaling": Verb(
        "[OPTIONS]",
        "cost of a token against the length of the context",
        _benchmark(benchmarks.ScalingSettings, benchmarks.scaling),
    ),
    "benchmark pareto": Verb(
        "[--models RUNS --prompts SET --judge RUN] [OPTIONS]",
        "speed against quality, every decoder at several values of its knob",
        _benchmark(benchmarks.ParetoSettings, benchmarks.pareto),
    ),
    "benchmark steps": Verb(
        "--models RUNS --data SET [OPTIONS]",
        "denoising steps that a perplexity takes, with and without the causal branch",
        _benchmark(benchmarks.StepsSettings, benchmarks.steps),
    ),
    "benchmark acceptance": Verb(
        "--models RUNS --data SET [OPTIONS]",
        "drafts that stand, by place, temperature, target and training step",
        _benchmark(benchmarks.AcceptanceSettings, benchmarks.measure_acceptance),
    ),
    "benchmark infill": Verb(
        "--models RUNS --data SET [OPTIONS]",
        "spans given both sides, against what the left side alone tells",
        _benchmark(benchmarks.InfillSettings, benchmarks.infill),
    ),
    "reproduce": Verb("TABLE [OPTIONS]", "the paper's tables: trains and evaluates what is missing", _reproduce),
    "export": Verb(
        "MODEL --out FOLDER [OPTIONS]", "a model folder to be shipped: rounded weights, and a model card", _export
    ),
    "samples": Verb(
        "--models RUNS --prompt TEXT [OPTIONS]",
        "text of every method and decoder at equal cost, for the report",
        _samples,
    ),
    "report": Verb("RESULTS [-o FILE]", "one page: tables, curves, samples and recordings of result files", _report),
    "methods": Verb("[--json]", "what can be trained: objective, likelihood, sampler and source", _methods),
    "info": Verb("[RUN] [OPTIONS]", "parameters, floating-point operations and memory of a model", _info),
}
