"""Exponential moving average of a model's parameters: state in, state out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Average = dict[str, Tensor]
"""Parameters by name, in float32 or better."""


def start(model: nn.Module) -> Average:
    """The average of what the parameters are now."""
    return {name: _precise(parameter).clone() for name, parameter in model.named_parameters()}


def updated(average: Average, model: nn.Module, step: int, decay: float) -> Average:
    """The average after update `step` (from 1).

    Early on it forgets faster, at `(1 + step) / (10 + step)`, so that it does not remember the initialisation.
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    named = dict(model.named_parameters())
    moved = torch._foreach_lerp([average[name] for name in named], [_precise(each) for each in named.values()], weight)
    return dict(zip(named, moved, strict=True))


@contextmanager
def averaged(model: nn.Module, average: Average) -> Iterator[nn.Module]:
    """`model` in evaluation mode with the average for its parameters; afterwards the very same parameters are back."""
    raw = {name: parameter.data for name, parameter in model.named_parameters()}
    training = model.training
    try:
        for name, parameter in model.named_parameters():
            parameter.data = average[name].to(parameter.dtype)
        yield model.eval()
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = raw[name]
        model.train(training)


def _precise(parameter: Tensor) -> Tensor:
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
