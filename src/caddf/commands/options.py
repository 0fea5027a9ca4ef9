"""Options that several verbs have."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from caddf.compile import Compile
from caddf.quantise import Quantisation
from caddf.text_model import DType


def reading_options(parser: ArgumentParser) -> None:
    """Where a model is read, and in which numbers."""
    add = parser.add_argument
    add("--device", type=str, default="auto", help="auto (a GPU where there is one), cpu, cuda or mps")
    add("--dtype", type=DType, default="float32", help="of weights and arithmetic")
    add("--quantize", type=Quantisation | None, metavar="{int8,bf16}",
        help="weights of fewer bytes for decoding, on a CPU")  # fmt: skip


def model_options(parser: ArgumentParser) -> None:
    """Those, and the seed."""
    reading_options(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="INT", help="of all that is drawn")


def compile_option(parser: ArgumentParser) -> None:
    """By what a model decodes."""
    parser.add_argument("--compile", type=Compile, default="auto", metavar="{auto,always,never}",
        help="decoding by compiled kernels on a CPU, CUDA graphs on a GPU; auto: where the model suits")  # fmt: skip


def json_option(parser: ArgumentParser) -> None:
    """JSON in place of a table."""
    parser.add_argument("--json", action="store_true", help="print one JSON value on standard output, and no table")
