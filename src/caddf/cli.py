"""The command line: its verbs, and what is said where one fails. What a verb does is in `caddf.commands`.

Results go to standard output, all else to standard error. Of the package that is imported which a verb needs.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib import import_module

from caddf.errors import Failure, InputError
from caddf.interrupted import INTERRUPTED, stopping
from caddf.version import installed_version

GROUPS = ("data", "benchmark")
"""First words of commands that are two."""


@dataclass(frozen=True)
class Verb:
    """A command: its arguments and what it does, for `--help`, and the function of `caddf.commands` that runs it."""

    takes: str
    about: str
    run: str


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
        return _run(verb, name, arguments[words:])
    except InputError as error:
        print(f"caddf: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        return 1
    except OSError as error:
        if error.filename is None:
            raise
        from caddf.checkpoint import named

        print(f"caddf: error: {named(error.filename)} cannot be used: {error.strerror}", file=sys.stderr)
        return 2
    except Failure as error:
        print(f"caddf: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("caddf: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(verb: Verb, name: str, arguments: list[str]) -> int:
    """Runs a verb with the arguments behind it."""
    module, _, function = verb.run.partition(":")
    with stopping():
        run = getattr(import_module(f"caddf.commands.{module}"), function)
        from caddf.settings import new_parser
    return int(run(new_parser(f"caddf {name}", verb.takes, verb.about), arguments))


def _verbs(group: str) -> dict[str, Verb]:
    """The commands of a group, or all of them."""
    return {name: verb for name, verb in VERBS.items() if not group or name.startswith(f"{group} ")}


def _usage(group: str) -> str:
    verbs, command = _verbs(group), f"caddf {group} COMMAND".replace("  ", " ")
    width = max(map(len, verbs))
    lines = [f"  caddf {name:<{width}}  {verb.about}" for name, verb in verbs.items()]
    return "\n".join([f"usage: {command} [OPTIONS]", "", *lines, "", f"{command} --help lists a command's options."])


VERBS = {
    "data prepare": Verb(
        "--input SOURCE | --train SOURCE [--validation SOURCE] [--test SOURCE] --out SET [OPTIONS]",
        "turn text into a token set",
        "prepare:data_prepare",
    ),
    "train": Verb(
        "[--config METHOD|FILE] --data SET --out RUN [OPTIONS] | --resume RUN",
        "train a model, or go on with a run",
        "training:train",
    ),
    "evaluate": Verb(
        "MODEL --data SET [OPTIONS]", "likelihoods, bounds and accuracies with standard errors", "evaluating:evaluate"
    ),
    "compare": Verb(
        "OURS.json THEIRS.json [--json]",
        "two models' perplexities on the same windows, as paired ratios",
        "evaluating:compare",
    ),
    "generate": Verb(
        "MODEL --prompt TEXT | --template TEXT [OPTIONS]",
        "continue a prompt, or fill the holes of a template",
        "generating:generate",
    ),
    "serve": Verb(
        "MODEL [OPTIONS]",
        "a model over HTTP: completions in OpenAI's format, holes, log-probabilities, and a page",
        "serving:serve",
    ),
    "benchmark decode": Verb(
        "[OPTIONS]",
        "tokens a second, passes, caches and memory of every decoder, and what the text is worth",
        "measuring:benchmark",
    ),
    "benchmark train": Verb(
        "[OPTIONS]",
        "a training step against plain PyTorch with full logits: speed and memory",
        "measuring:benchmark",
    ),
    "benchmark scaling": Verb(
        "[OPTIONS]",
        "cost of a token against the length of the context",
        "measuring:benchmark",
    ),
    "benchmark pareto": Verb(
        "--models RUNS --prompts SET --judge RUN [OPTIONS]",
        "speed against quality, every decoder at several values of its knob",
        "measuring:benchmark",
    ),
    "benchmark steps": Verb(
        "--models RUNS --data SET [OPTIONS]",
        "denoising steps that a perplexity takes, with and without the causal branch",
        "measuring:benchmark",
    ),
    "benchmark acceptance": Verb(
        "--models RUNS --data SET [OPTIONS]",
        "drafts that stand, by place, temperature, target and training step",
        "measuring:benchmark",
    ),
    "benchmark infill": Verb(
        "--models RUNS --data SET [OPTIONS]",
        "spans given both sides, against what the left side alone tells",
        "measuring:benchmark",
    ),
    "reproduce": Verb(
        "TABLE [OPTIONS]", "the paper's tables: trains and evaluates what is missing", "measuring:reproduce"
    ),
    "export": Verb(
        "MODEL --out FOLDER [OPTIONS]",
        "a model folder to be shipped: rounded weights, and a model card",
        "showing:export",
    ),
    "samples": Verb(
        "--models RUNS --prompt TEXT [OPTIONS]",
        "text of every method and decoder at equal cost, for the report",
        "showing:samples",
    ),
    "report": Verb(
        "RESULTS [-o FILE]", "one page: tables, curves, samples and recordings of result files", "showing:report"
    ),
    "methods": Verb("[--json]", "what can be trained: objective, likelihood, sampler and source", "describing:methods"),
    "info": Verb("[RUN] [OPTIONS]", "parameters, floating-point operations and memory of a model", "describing:info"),
}
