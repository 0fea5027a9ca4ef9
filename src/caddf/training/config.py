"""The settings of a training run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from caddf.errors import Checked, InputError, a_share, at_least
from caddf.models.config import Preset
from caddf.training.compiling import CompileSteps
from caddf.training.optimizer import OptimizerName

Precision = Literal["auto", "bf16", "fp32", "fp64"]
Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True)
class TrainConfig(Checked):
    """How a model is trained; what is not set follows from the model's preset (Table 5) or from the number of steps.

    steps: updates of the parameters; not set, the preset's.
    batch_size: rows of one update, over all passes and processes; not set, the preset's.
    accumulation: passes that an update's rows are split into, to fit memory.
    learning_rate: peak of the learning rate; not set, the preset's.
    warmup: updates of linear warm-up; not set, the preset's, but at most a tenth of the steps.
    min_ratio: the learning rate at the end of the cosine, as a share of the peak.
    optimizer: adamw (as published), or muon, whose steps of the matrices are orthogonal.
    weight_decay: decoupled decay of the matrices.
    clip: largest norm of an update's gradient; 0 does not clip.
    ema: decay of the moving average of the parameters, which is what is evaluated and saved as the model; 0 is none.
    seed: of the objective's draws.
    precision: of the passes; bf16 is autocast over float32 parameters, and what auto takes on hardware that has it.
    device: where the model is trained; auto takes a GPU where there is one.
    compile: whether steps are compiled by PyTorch, which takes a minute or two at the start; auto does on a GPU.
    log_every: updates between two lines of the metrics.
    evaluate_every: updates between two evaluations; 0 is never; not set, as checkpoint_every.
    sample_every: updates between two samples of text; 0 is never; not set, as checkpoint_every.
    checkpoint_every: updates between two checkpoints; not set, an eighth of the steps, but at most 1000.
    keep: how many of the last checkpoints are kept, the best one besides.
    tensorboard: also write the metrics for TensorBoard.
    """

    section = "train."

    steps: int | None = None
    batch_size: int | None = None
    accumulation: int = 1
    learning_rate: float | None = None
    warmup: int | None = None
    min_ratio: float = 0.1
    optimizer: OptimizerName = "adamw"
    weight_decay: float = 0.1
    clip: float = 1.0
    ema: float = 0.9999
    seed: int = 0
    precision: Precision = "auto"
    device: Device = "auto"
    compile: CompileSteps = "auto"
    log_every: int = 10
    evaluate_every: int | None = None
    sample_every: int | None = None
    checkpoint_every: int | None = None
    keep: int = 2
    tensorboard: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "steps", "batch_size", "accumulation", "log_every", "checkpoint_every", "keep")
        at_least(0, self, "warmup", "evaluate_every", "sample_every", "seed")
        a_share(self, "min_ratio")
        for name in ("weight_decay", "clip"):
            self._check(name, lambda value: 0 <= value < math.inf, "0 or more, and finite")
        self._check("learning_rate", lambda value: 0 < value < math.inf, "above 0, and finite")
        self._check("ema", lambda value: 0 <= value < 1, "in [0, 1)")
        if self.steps is not None and self.warmup is not None and self.warmup > self.steps:
            raise InputError(f"train.warmup is {self.warmup}; it must be at most train.steps, {self.steps}")
        if self.batch_size is not None and self.batch_size % self.accumulation:
            raise InputError(
                f"train.batch_size is {self.batch_size}; "
                f"it must be a multiple of train.accumulation, {self.accumulation}"
            )

    def resolved(self, preset: Preset) -> ResolvedTrainConfig:
        """These settings with nothing left open."""
        steps = preset.steps if self.steps is None else self.steps
        every = max(1, min(1000, steps // 8)) if self.checkpoint_every is None else self.checkpoint_every
        defaults: dict[str, Any] = {
            "steps": steps,
            "batch_size": preset.batch,
            "learning_rate": preset.learning_rate,
            "warmup": min(preset.warmup, steps // 10),
            "evaluate_every": every,
            "sample_every": every,
            "checkpoint_every": every,
        }
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return ResolvedTrainConfig(**{name: defaults[name] if v is None else v for name, v in values.items()})

    def _check(self, name: str, holds: Callable[[Any], bool], right: str) -> None:
        value = getattr(self, name)
        if value is not None and not holds(value):
            raise InputError(f"train.{name} is {value}; it must be {right}")


@dataclass(frozen=True, kw_only=True)
class ResolvedTrainConfig(TrainConfig):
    """`TrainConfig` with every setting set: what the loop takes, and what is saved with a run."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int
    evaluate_every: int
    sample_every: int
    checkpoint_every: int

    @property
    def rows_per_pass(self) -> int:
        """Rows of one pass over all processes: what `Batches.take` is asked for."""
        return self.batch_size // self.accumulation
