"""Decoding with fewer steps between operations: kernels in C on a CPU, CUDA graphs on a GPU.

On a CPU it is passes of a few slots over a cache, and whole rounds of drafts, that go through kernels; on a GPU whole
rounds are recorded once and launched at one go (`caddf.graphs`). All else is read as it was: whole rows, and on a GPU
prompts.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, TypeVar, cast

from torch import nn

from caddf import native
from caddf.errors import InputError
from caddf.graphs import Graphs

Compile = Literal["auto", "always", "never"]
"""`auto`: where the model suits, and on a CPU there is a C compiler (a second or two, once per machine)."""
Model = TypeVar("Model", bound=nn.Module)


def compiled(model: Model, when: Compile = "always") -> Model:
    """`model` itself, whose rounds, and on a CPU passes of a few positions over caches, are compiled ones from now on.

    With `always`, raises `InputError` where nothing of the model can be compiled, and warns where compiling fails.
    """
    if when == "never":
        return model
    device = next(model.parameters()).device.type
    suits = {"cpu": native.suits, "cuda": Graphs.suits}.get(device, lambda _: False)
    if not suits(model):
        if when == "auto":
            return model
        if getattr(model, "causal", None) is None:
            raise InputError(f"compile is {when} with a {type(model).__name__} that has no causal branch; leave it out")
        needs = {
            "cpu": "on a CPU it needs float32 weights, heads of at most 256 channels, and fusion late",
            "cuda": "on a GPU it needs a causal branch that reads no canvas: fusion late",
        }.get(device, f"it is for cpu and cuda, not for {device}")
        raise InputError(f"compile is {when}; {needs}: leave it out")
    if device == "cuda":
        cast(Any, model).graphs = Graphs(model)
        return model
    try:
        return native.attach(model)
    except native.BuildError as error:
        if when == "always":
            warnings.warn(f"compile is always, but compiling failed; going on without: {error}", stacklevel=2)
        return model
