"""What a model costs: parameters, operations, memory."""

from __future__ import annotations

from typing import Any, Protocol


class Sized(Protocol):
    """What the accounts are made of."""

    config: Any

    def parameter_counts(self) -> dict[str, int]:
        """Parameters per part, and in all under `total`."""

    def flops_per_position(self) -> dict[str, float]:
        """Floating-point operations of a forward pass per position and part."""

    def cached_per_position(self) -> int:
        """Numbers that decoding keeps of each position of a row."""


def accounts(model: Sized) -> dict[str, Any]:
    """Parameters per part, FLOPs per token, and memory in bytes, as plain values.

    `training_state` is weights, gradients, two moments and the average of the weights, in float32, without activations;
    `caches_per_row` is what one row of decoding keeps over the whole context, in bfloat16.
    """
    counts, config = model.parameter_counts(), model.config
    return {
        "parameters": counts,
        "flops_per_token": model.flops_per_position(),
        "memory": {
            "weights_float32": 4 * counts["total"],
            "weights_bfloat16": 2 * counts["total"],
            "training_state": 20 * counts["total"],
            "caches_per_row": 2 * model.cached_per_position() * config.context,
        },
        "context": config.context,
        "vocab_size": config.vocab_size,
        "block_size": getattr(config, "block_size", None),
    }
