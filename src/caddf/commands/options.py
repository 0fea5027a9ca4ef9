"""Options that several verbs have."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from caddf.quantise import Quantisation
from caddf.text_model import DType


def model_options(parser: ArgumentParser) -> None:
    """Where a model is read, in which numbers, and the seed."""
    add = parser.add_argument
    add("--device", type=str, default="auto", help="auto (a GPU where there is one), cpu, cuda or mps")
    add("--dtype", type=DType, default="float32", help="of weights and arithmetic")
    add("--quantize", type=Quantisation | None, metavar="{int8,bf16}",
        help="weights of fewer bytes for decoding, on a CPU")  # fmt: skip
    add("--seed", type=int, default=0, metavar="INT", help="of all that is drawn")


def json_option(parser: ArgumentParser) -> None:
    """JSON in place of a table."""
    parser.add_argument("--json", action="store_true", help="print one JSON value on standard output, and no table")
