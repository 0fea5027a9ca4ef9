"""Weights as other authors published them: recognised by their configuration, and renamed into this project's networks.

Each layout is a file. What a layout's authors left open (epsilons, activations, rotary base) is this project's own
default; a configuration that says otherwise is refused, never read wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from caddf.models.published.checkpoint import Published, read_config
from caddf.models.published.ddit import is_mdlm, is_radd, is_sedd, mdlm, radd, sedd
from caddf.models.published.gpt2 import causal_state, gpt2, is_gpt2

__all__ = ["LAYOUTS", "Layout", "Published", "causal_state", "recognise"]


@dataclass(frozen=True)
class Layout:
    """Whether a configuration is of this layout, and what it says, given the number of tokens of the tokenizer."""

    recognises: Callable[[dict[str, Any]], bool]
    read: Callable[[dict[str, Any], int], Published]


LAYOUTS: dict[str, Layout] = {
    "gpt2": Layout(is_gpt2, gpt2),
    "mdlm": Layout(is_mdlm, mdlm),
    "radd": Layout(is_radd, radd),
    "sedd": Layout(is_sedd, sedd),
}


def recognise(folder: Path) -> Callable[[int], Published] | None:
    """How to read the published checkpoint in `folder`, given the number of tokens of its tokenizer; None: it is none.

    Rows of its tables beyond the tokens are padding. Reading raises `InputError` where a setting is missing or is not
    supported.
    """
    config = read_config(folder)
    layouts = (layout for layout in LAYOUTS.values() if layout.recognises(config))
    return next((partial(layout.read, config) for layout in layouts), None)
