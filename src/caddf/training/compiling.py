"""Training steps compiled by PyTorch: layer by layer, so that what is alike is compiled once, and the heads' losses.

On a GPU the launches of a step then cost more than its arithmetic: forward and backward are recorded as CUDA graphs.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from caddf.models.chain import DraftChain
from caddf.models.fusion import CrossFusion, Mixer
from caddf.models.layers import Layer
from caddf.objectives.reading import Reading

CompileSteps = Literal["auto", "always", "never"]
"""`auto`: on a GPU that PyTorch's compiler has kernels for."""
SHAPES = 12
"""Most shapes of readings that are recorded; a batch's shares are rounded up or down, so that there are a few."""
Losses = tuple[Tensor, dict[str, Tensor]]
"""A loss, and its parts."""


def compiles(when: CompileSteps, device: torch.device) -> bool:
    """Whether steps on `device` are compiled."""
    if when != "auto":
        return when == "always"
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


@contextmanager
def compiled_steps(model: nn.Module, backend: str = "inductor") -> Iterator[None]:
    """Within, `model` is read by compiled layers, and an objective scores it by compiled losses.

    Batches of any number of rows go through one compilation. What the compiler fails at is read as it is. `backend` is
    one of torch's.
    """
    layers = [module for module in model.modules() if isinstance(module, (Layer, CrossFusion, Mixer, DraftChain))]
    switched: Any = model
    with torch._dynamo.config.patch(suppress_errors=True):
        for layer in layers:
            layer.compile(dynamic=True, backend=backend)
        switched.compiled_training = backend
        try:
            yield
        finally:
            switched.compiled_training = None
            for layer in layers:
                layer._compiled_call_impl = None


@contextmanager
def as_it_is() -> Iterator[None]:
    """Within, nothing is compiled: for what is read now and then, in other shapes."""
    with torch.compiler.set_stance("force_eager"):
        yield


@dataclass(frozen=True)
class _Recording:
    """A graph of forward and backward, what it reads, what it leaves, and the gradients of each parameter."""

    graph: torch.cuda.CUDAGraph
    inputs: Sequence[Tensor]
    losses: Losses
    gradients: Sequence[Tensor | None]


class RecordedSteps:
    """Forward and backward of readings on a GPU, recorded once for each of their shapes and launched at one go.

    `draw` makes readings of tokens, and `read` losses of readings, which asks nothing of the device; gradients are left
    in `parameters`, which have none before. The first readings of a shape go through `read` itself, so that compiling
    is over when it is recorded. Where recording fails, it warns, and goes on without.
    """

    def __init__(
        self,
        draw: Callable[[Int[Tensor, "B L"], torch.Generator], Sequence[Reading]],
        read: Callable[[Sequence[Reading]], Losses],
        parameters: Sequence[nn.Parameter],
    ) -> None:
        self.draw, self.read, self.parameters = draw, read, parameters
        self.seen: dict[tuple[Any, ...], int] = {}
        self.recordings: dict[tuple[Any, ...], _Recording] = {}
        self.pool: Any = None
        self.failed = False

    def __call__(self, tokens: Int[Tensor, "B L"], generator: torch.Generator) -> Losses:
        """The losses of a batch, and their gradients in the parameters."""
        readings = self.draw(tokens, generator)
        given = tensors_of(readings)
        shape = shape_of(readings, given)
        recording = self.recordings.get(shape)
        if recording is None:
            self.seen[shape] = self.seen.get(shape, 0) + 1
            if self.failed or self.seen[shape] < 2 or len(self.recordings) == SHAPES:
                return self._learn(readings)
            recording = self._record(readings)
            if recording is None:
                return self._learn(readings)
            self.recordings[shape] = recording
        torch._foreach_copy_(list(recording.inputs), list(given))
        recording.graph.replay()
        for parameter, gradient in zip(self.parameters, recording.gradients, strict=True):
            parameter.grad = gradient
        return recording.losses

    def _learn(self, readings: Sequence[Reading]) -> Losses:
        loss, parts = self.read(readings)
        loss.backward()
        return loss.detach(), parts

    def _forget(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _record(self, readings: Sequence[Reading]) -> _Recording | None:
        try:
            inputs = [tensor.clone() for tensor in tensors_of(readings)]
            own = with_tensors(readings, inputs)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # what happens at a first call happens here
                for _ in range(2):
                    self._learn(own)
                    self._forget()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                losses = self._learn(own)
            self.pool = graph.pool()
            gradients = [parameter.grad for parameter in self.parameters]
            self._forget()
        except RuntimeError as error:
            warnings.warn(f"steps are not recorded as CUDA graphs: {error}", stacklevel=2)
            self.failed = True
            self._forget()
            return None
        return _Recording(graph, inputs, losses, gradients)


def tensors_of(readings: Sequence[Reading]) -> list[Tensor]:
    """All tensors of `readings`, each once."""
    return list({id(each): each for reading in readings for each in _tensors(reading)}.values())


def with_tensors(readings: Sequence[Reading], tensors: Sequence[Tensor]) -> list[Reading]:
    """`readings` with others in the place of `tensors_of` them; what was one tensor is one again."""
    new = {id(old): tensor for old, tensor in zip(tensors_of(readings), tensors, strict=True)}
    return [
        replace(
            reading,
            x0=new[id(reading.x0)],
            prefix=new[id(reading.prefix)],
            canvas=new[id(reading.canvas)],
            terms={head: replace(term, weights=new[id(term.weights)]) for head, term in reading.terms.items()},
        )
        for reading in readings
    ]


def shape_of(readings: Sequence[Reading], tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """What two lists of readings have in common where one recording is for both."""
    number = {id(tensor): i for i, tensor in enumerate(tensors)}
    kinds = tuple(
        (
            type(reading.pattern),
            astuple(reading.pattern),
            reading.share,
            reading.distillation,
            tuple((head, term.coefficient) for head, term in reading.terms.items()),
            tuple(number[id(tensor)] for tensor in _tensors(reading)),
        )
        for reading in readings
    )
    return kinds, tuple((tensor.shape, tensor.dtype) for tensor in tensors)


def _tensors(reading: Reading) -> list[Tensor]:
    return [reading.x0, reading.prefix, reading.canvas, *(term.weights for term in reading.terms.values())]
