"""`caddf generate`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from caddf import display, generation
from caddf.checkpoint import check_writable
from caddf.commands.options import compile_option, json_option, model_options
from caddf.decoding import DECODERS
from caddf.errors import InputError, at_least
from caddf.generation import NEW
from caddf.samples import Recording
from caddf.settings import add_choices, options, parse
from caddf.text_model import load


def generate(parser: ArgumentParser, arguments: list[str]) -> int:
    """Runs `caddf generate` and returns its exit code."""
    add = parser.add_argument
    add("model", type=str, help="a run, a model folder, or OWNER/NAME on the hub")
    add("--prompt", type=str, action="append", metavar="TEXT", help="text to continue; again for a batch")
    add("--prompt-file", type=str, action="append", metavar="FILE",
        help="a file of text to continue, all of it; - is standard input")  # fmt: skip
    add("--template", type=str, action="append", metavar="TEXT",
        help="text with holes to fill, 'def f(x):[MASK:24]return y'; again for a batch")  # fmt: skip
    add("--template-file", type=str, action="append", metavar="FILE", help="a file of such text; - is standard input")
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
    model_options(parser)
    compile_option(parser)
    json_option(parser)
    add_choices(parser, "settings of some decoders; not set, the decoder's own default", DECODERS, skip=("until",))
    values = parse(parser, arguments)
    at_least(1, batch=values.batch)
    if values.record is not None:
        check_writable("record", values.record)
    read = {name: map(_text_of, values[f"{name}_file"] or ()) for name in ("prompt", "template")}
    texts = {name: given for name, files in read.items() if (given := [*(values[name] or ()), *files])}
    if values.batch > 1 and sum(map(len, texts.values())) != 1:
        raise InputError(f"batch is {values.batch}, which repeats one prompt or template; give exactly one")
    settings: dict[str, Any] = {}
    for decoder in DECODERS.values():
        settings |= options(decoder, values)
    model = load(
        values.model, device=values.device, dtype=values.dtype, quantize=values.quantize, compile=values.compile
    )
    frames = generation.generate(
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


def _text_of(file: str) -> str:
    """The whole of a file, or of standard input; raises `InputError` where it cannot be read as text."""
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as text: {getattr(error, 'strerror', None) or error}") from error
