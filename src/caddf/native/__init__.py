"""Decoding on CPUs through kernels in C, compiled for the machine at their first use (a second or two).

What decoding pays for is the reading of weights and, with small models, the steps between operations. `attach` gives a
model's passes of a few positions over caches to `kernels.c`, which runs a whole stack of layers in one call, made of
`maps.c` and `attention.c`, and rounds of left-to-right decoding to `rounds.c`, made of `drafts.c`, `draws.c` and
`verification.c`; `threads.c` has the threads that share them, and `layout.c` says where `structures.py` must have the
fields of what is passed.
All else (training, whole rows, other dtypes) stays with the modules, which are the reference that tests compare with.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

from torch import nn

from caddf.native.build import BuildError
from caddf.native.model import Native

Model = TypeVar("Model", bound=nn.Module)

__all__ = ["BuildError", "Native", "attach", "suits"]


def suits(model: nn.Module) -> bool:
    """Whether `attach` can be asked for: a causal branch in float32 on a CPU, fusion late or none of it."""
    return hasattr(model, "native") and Native.suits(model)


def attach(model: Model) -> Model:
    """`model` itself, whose passes of a few positions go through the kernels, which lay matrices out for themselves.

    Those of a model whose matrices were rounded (`caddf.quantise`) are held so, and fewer bytes read.
    Raises `BuildError` where there is no C compiler. The model must be one that `suits`.
    """
    whole = cast(Any, model)
    whole.native = Native(model)
    return model
