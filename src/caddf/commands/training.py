"""`caddf train`."""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console

from caddf.errors import InputError
from caddf.experiment import METHODS
from caddf.interrupted import INTERRUPTED
from caddf.run_options import add_sections, parse_given, read_given, run_settings
from caddf.running import TrainingDType, resume, start
from caddf.training.config import Device


def train(parser: ArgumentParser, arguments: list[str]) -> int:
    """Runs `caddf train` and returns its exit code."""
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
