"""`caddf data prepare`."""

from __future__ import annotations

import sys

from jsonargparse import ArgumentParser

from caddf import display
from caddf.data import prepare
from caddf.data.named import NAMED
from caddf.settings import parse


def data_prepare(parser: ArgumentParser, arguments: list[str]) -> int:
    """Runs `caddf data prepare` and returns its exit code."""
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
