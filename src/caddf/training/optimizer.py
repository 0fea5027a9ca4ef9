"""AdamW, Muon, and their learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import AdamW

OptimizerName = Literal["adamw", "muon"]


def build_optimizer(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    name: OptimizerName = "adamw",
) -> AdamW:
    """AdamW (fused) with decoupled decay on matrices only (Table 5; Loshchilov & Hutter 2019).

    Vectors (norms, biases) do not decay, nor do embeddings: a rare token's row gets little gradient, and decay alone
    would move it. A model's `rate_scales` (parts of it, to factors) gives these parts learning rates of their own, as
    `scale` in their groups. With `muon` the matrices that decay take Muon's steps.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    scales: dict[str, float] = getattr(model, "rate_scales", {})
    groups: dict[tuple[bool, float], list[tuple[str, nn.Parameter]]] = {}
    for part, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and id(parameter) not in tables
        groups.setdefault((matrix, scales.get(part.split(".")[0], 1.0)), []).append((part, parameter))
    return (Muon if name == "muon" else AdamW)(
        [
            {"params": named, "weight_decay": weight_decay if matrix else 0.0, "scale": scale, "matrix": matrix}
            for (matrix, scale), named in groups.items()
        ],
        lr=learning_rate,
        betas=betas,
        fused=True,
    )


class Muon(AdamW):
    """Momentum made orthogonal for the groups marked `matrix`, AdamW for the others (Jordan et al. 2024).

    A step of a matrix has the root mean square that AdamW's have, so that both take one learning rate and one decay
    (Liu et al. 2025, eq. 4). Float32 is turned in bfloat16 on a GPU, as there, and as it is elsewhere.
    """

    momentum = 0.95

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient."""
        everything = self.param_groups
        try:
            self.param_groups = [group for group in everything if not group["matrix"]]
            loss = super().step(closure)
        finally:
            self.param_groups = everything
        for group in everything:
            if group["matrix"]:
                self._turn([each for each in group["params"] if each.grad is not None], group)
        return loss

    def _turn(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """Steps of matrices: those of one shape together, since one by one their launches cost more than they do."""
        alike: dict[torch.Size, list[Tensor]] = {}
        for parameter in parameters:
            alike.setdefault(parameter.shape, []).append(parameter)
            state = self.state[parameter]
            if not state:
                state["step"], state["exp_avg"] = torch.zeros(()), torch.zeros_like(parameter)
            state["step"] += 1
        for shape, these in alike.items():
            gradients = [cast(Tensor, each.grad) for each in these]
            averages = [self.state[each]["exp_avg"] for each in these]
            torch._foreach_lerp_(averages, gradients, 1 - self.momentum)
            ahead = torch._foreach_lerp(gradients, averages, self.momentum)  # Nesterov's
            stacked = torch.stack(ahead)
            half = stacked.is_cuda and stacked.dtype == torch.float32
            directions = orthogonal(stacked.bfloat16() if half else stacked).to(stacked.dtype).unbind()
            torch._foreach_mul_(these, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(these, directions, alpha=-0.2 * math.sqrt(max(shape)) * group["lr"])


def orthogonal(matrix: Float[Tensor, "*N m n"], steps: int = 5) -> Float[Tensor, "*N m n"]:
    """Roughly U V' of the singular value decomposition: singular values between about 0.7 and 1.2.

    Newton-Schulz iterations with the coefficients of Jordan et al. 2024.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def learning_rate_at(step: int, peak: float, steps: int, warmup: int, min_ratio: float) -> float:
    """The rate of update `step` of `steps` (from 1): linear to `peak` over `warmup`, then a cosine (Table 5).

    The cosine ends at `min_ratio` times `peak` (Loshchilov & Hutter 2017).
    """
    if step <= warmup:
        return peak * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * min(1.0, done))) / 2)
