"""What an objective is, and the draws that objectives share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from caddf.interface import Head, LanguageModel

Times = Literal["stratified", "antithetic", "independent"]


@dataclass(frozen=True)
class Loss:
    """`total`: a scalar to descend (nats per token); `parts`: what it is made of, for the log (nats per token)."""

    total: Float[Tensor, ""]
    parts: dict[str, Float[Tensor, ""]] = field(default_factory=dict)


class Objective(Protocol):
    """Draws noise from `generator` (a CPU generator, moved on), corrupts `x0`, asks the model, returns the loss."""

    def __call__(self, model: LanguageModel, x0: Int[Tensor, "B L"], generator: torch.Generator) -> Loss:
        """The loss of one batch."""


def whole(count: float, generator: torch.Generator) -> int:
    """One of the integers next to `count`, which it is in expectation."""
    return int(count + torch.rand((), generator=generator, dtype=torch.float64))


def draw_times(rows: int, times: Times, generator: torch.Generator) -> Float[Tensor, " B"]:
    """Times in (0, 1], each uniform by itself, spread over the rows to lower the variance of their mean.

    `stratified`: one in each of `rows` equal parts, which rows share out by chance; `antithetic`: pairs t, 1 - t;
    `independent`: neither.
    """
    if times == "stratified":
        part = torch.randperm(rows, generator=generator)
        u = (part + torch.rand(rows, generator=generator, dtype=torch.float64)) / rows
    elif times == "antithetic":
        half = torch.rand(-(-rows // 2), generator=generator, dtype=torch.float64)
        u = torch.cat([half, 1 - half])[:rows]
    else:
        u = torch.rand(rows, generator=generator, dtype=torch.float64)
    return 1 - u.clamp(max=1 - 2**-53)  # rounding may reach 1, and t = 0 has no weight


def finest(device: torch.device) -> torch.dtype:
    """Float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def weights_like(x0: Int[Tensor, "B L"], weights: Tensor | float) -> Float[Tensor, "B L"]:
    """`weights`, which may be one for each row, as those of all positions, over their number: sums become means.

    In float64 where the device has it.
    """
    given = torch.as_tensor(weights, dtype=finest(x0.device)).to(x0.device)
    return (given / x0.numel()).expand(x0.shape)


def nats_at(
    model: LanguageModel,
    states: object,
    where: Bool[Tensor, "B L"],
    x0: Int[Tensor, "B L"],
    head: Head,
) -> Float[Tensor, "B L"]:
    """-log p(x0_i) at the positions in `where`, zero elsewhere."""
    nats = model.nll(states, where, x0, head)
    return torch.zeros(x0.shape, dtype=nats.dtype, device=x0.device).masked_scatter(where, nats)
