"""Decoding with fewer steps between operations: kernels in C on a CPU, `torch.compile` on a GPU.

Compiled is what each token and each round of drafts costs: passes of a few slots over a cache. All else is read as it
was: prompts, whole rows, and on a GPU slots beyond the context, where attention slides.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from caddf import native
from caddf.caches import KVCache, Slots
from caddf.errors import InputError
from caddf.models.causal import CausalBranch

Compile = Literal["auto", "always", "never"]
"""`auto`: on a CPU, where the model suits and there is a C compiler (a second or two, once per machine)."""
Model = TypeVar("Model", bound=nn.Module)


class CachedPass:
    """In the place of a causal branch's `forward`: passes over at most `widest` slots of a cache are compiled ones.

    Lengths, positions and rows are symbols in what is compiled, so that one slot and several slots are compiled once
    each (and once more for batches), at their first use. Where compiling fails (an operation that the compiler does not
    know) it says so once, in a warning, and every pass is the branch's own.
    """

    def __init__(self, branch: CausalBranch, widest: int) -> None:
        self.widest, self.context, self.whole = widest, branch.context, branch.forward
        # Kernels of one pass are to be launched as one CUDA graph.
        self.run: Callable[..., Any] | None = torch.compile(self._pass, dynamic=True, mode="reduce-overhead")

    def _pass(
        self,
        inputs: Int[Tensor, "B n"],
        positions: Int[Tensor, "B n"],
        upto: int,
        cache: KVCache,
        earlier: Tensor | None,
    ) -> Float[Tensor, "B n D"]:
        """Slots by their positions as a tensor: what is compiled holds for them all."""
        return self.whole(inputs, Slots(positions, None, upto), cache, earlier=earlier)

    def __call__(
        self,
        inputs: Int[Tensor, "B n"],
        positions: Tensor | Slots,
        cache: KVCache | None = None,
        source: Any = None,
        earlier: Int[Tensor, "B n"] | None = None,
    ) -> Float[Tensor, "B n D"]:
        """States of the slots `positions`, as `CausalBranch.forward` gives them."""
        slots = positions if isinstance(positions, Slots) else Slots.of(positions)
        few = inputs.shape[1] <= self.widest < slots.upto <= self.context
        if self.run is None or cache is None or source is not None or not few:
            return self.whole(inputs, slots, cache, source, earlier)
        try:
            at = slots.positions.expand(len(inputs), -1).contiguous()
            states: Tensor = self.run(inputs, at, slots.upto, cache, earlier)
            return states
        except Exception as error:  # of whatever stage of the compiler; an error of the pass itself comes again below
            self.run = None
            said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            _warn(said)
            return self.whole(inputs, slots, cache, earlier=earlier)


def compiled(model: Model, when: Compile = "always") -> Model:
    """`model` itself, whose passes of a few positions over caches are compiled ones from now on.

    With `always`, raises `InputError` where nothing of the model can be compiled, and warns where compiling fails.
    """
    branch = getattr(model, "causal", None)
    on_cpu = next(model.parameters()).device.type == "cpu"
    if when == "never" or (when == "auto" and not (on_cpu and native.suits(model))):
        return model
    if not isinstance(branch, CausalBranch):
        raise InputError(f"compile is {when} with a {type(model).__name__} that has no causal branch; leave it out")
    if not on_cpu:
        branch.forward = CachedPass(branch, 2 * cast(int, model.block_size))  # type: ignore[method-assign]
        return model
    if not native.suits(model):
        raise InputError(
            f"compile is {when}; on a CPU it needs float32 weights, heads of at most 256 channels, "
            "and fusion late: leave it out"
        )
    try:
        return native.attach(model)
    except native.BuildError as error:
        if when == "always":
            _warn(str(error))
        return model


def _warn(said: str) -> None:
    warnings.warn(f"compile is always, but compiling failed; going on without: {said}", stacklevel=3)
