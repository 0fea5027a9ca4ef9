"""AdamW and its learning rate."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import AdamW


def build_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)
) -> AdamW:
    """AdamW (fused) with decoupled decay on matrices only (Table 5; Loshchilov & Hutter 2019).

    Vectors (norms, biases) do not decay, nor do embeddings: a rare token's row gets little gradient, and decay alone
    would move it. A model's `rate_scales` (parts of it, to factors) gives these parts learning rates of their own, as
    `scale` in their groups.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    scales: dict[str, float] = getattr(model, "rate_scales", {})
    groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        decay = weight_decay if parameter.ndim >= 2 and id(parameter) not in tables else 0.0
        scale = next((factor for part, factor in scales.items() if name.split(".")[0] == part), 1.0)
        groups.setdefault((decay, scale), []).append((name, parameter))
    return AdamW(
        [{"params": named, "weight_decay": decay, "scale": scale} for (decay, scale), named in groups.items()],
        lr=learning_rate,
        betas=betas,
        fused=True,
    )


def learning_rate_at(step: int, peak: float, steps: int, warmup: int, min_ratio: float) -> float:
    """The rate of update `step` of `steps` (from 1): linear to `peak` over `warmup`, then a cosine (Table 5).

    The cosine ends at `min_ratio` times `peak` (Loshchilov & Hutter 2017).
    """
    if step <= warmup:
        return peak * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * min(1.0, done))) / 2)
