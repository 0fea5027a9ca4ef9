"""The causal branch's cached pass through `torch.compile`: fewer and larger kernels where a pass is small.

Compiled is what each token and each round of drafts costs: a few slots over a cache. Lengths, positions and rows are
symbols in what is compiled, so that one slot and several slots are compiled once each (and once more for batches), at
their first use. All else is read as it was: prompts, and slots beyond the context, where attention slides.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from caddf.caches import KVCache, Slots
from caddf.errors import InputError
from caddf.models.causal import CausalBranch

Model = TypeVar("Model", bound=nn.Module)


class CachedPass:
    """In the place of a causal branch's `forward`: passes over at most `widest` slots of a cache are compiled ones.

    Where compiling fails (no C++ compiler, an operation that it does not know) it says so once, in a warning, and every
    pass is the branch's own.
    """

    def __init__(self, branch: CausalBranch, widest: int) -> None:
        self.widest, self.context, self.whole = widest, branch.context, branch.forward
        on_gpu = branch.embedding.weight.device.type == "cuda"
        # There, kernels of one pass are to be launched as one CUDA graph.
        self.run: Callable[..., Any] | None = torch.compile(
            self._pass, dynamic=True, mode="reduce-overhead" if on_gpu else None
        )

    def _pass(
        self, inputs: Int[Tensor, "B n"], positions: Int[Tensor, "B n"], upto: int, cache: KVCache
    ) -> Float[Tensor, "B n D"]:
        """Slots by their positions as a tensor: what is compiled holds for them all."""
        return self.whole(inputs, Slots(positions, None, upto), cache)

    def __call__(
        self, inputs: Int[Tensor, "B n"], positions: Tensor | Slots, cache: KVCache | None = None, source: Any = None
    ) -> Float[Tensor, "B n D"]:
        """States of the slots `positions`, as `CausalBranch.forward` gives them."""
        slots = positions if isinstance(positions, Slots) else Slots.of(positions)
        few = inputs.shape[1] <= self.widest < slots.upto <= self.context
        if self.run is None or cache is None or source is not None or not few:
            return self.whole(inputs, slots, cache, source)
        try:
            states: Tensor = self.run(inputs, slots.positions.expand(len(inputs), -1).contiguous(), slots.upto, cache)
            return states
        except Exception as error:  # of whatever stage of the compiler; an error of the pass itself comes again below
            self.run = None
            said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            warnings.warn(f"compile is on, but compiling failed; going on without: {said}", stacklevel=2)
            return self.whole(inputs, slots, cache)


def compiled(model: Model) -> Model:
    """`model` itself, whose causal branch compiles its cached pass when it first reads one.

    Raises `InputError` where there is no causal branch, and with quantised weights, which the compiler does not know.
    """
    branch = getattr(model, "causal", None)
    if not isinstance(branch, CausalBranch):
        raise InputError(f"compile is on with a {type(model).__name__} that has no causal branch; leave it out")
    if getattr(model, "readouts", {}):
        raise InputError("compile is on with quantize int8, whose kernels cannot be compiled; give one of them")
    widest = 2 * cast(int, model.block_size)
    branch.forward = CachedPass(branch, widest)  # type: ignore[method-assign]
    return model
