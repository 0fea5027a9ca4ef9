"""The training loop: one for every objective, on any device. It knows batches, losses and steps, and no diffusion."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import Any, Protocol, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from jaxtyping import Int
from rich.console import Console
from torch import Tensor, nn

from caddf.data.loader import Position
from caddf.errors import Failure, InputError
from caddf.objectives.loss import Objective, finest
from caddf.objectives.reading import ByReadings, Reading, read
from caddf.training import ema
from caddf.training.compiling import Losses, RecordedSteps, as_it_is, compiled_steps, compiles
from caddf.training.config import ResolvedTrainConfig
from caddf.training.log import RunLog
from caddf.training.optimizer import build_optimizer, learning_rate_at
from caddf.training.state import Checkpoints, Progress, TrainingState

T = TypeVar("T")


class TrainingError(Failure):
    """Training went wrong by itself (loss or gradient not finite): says where, and what to try."""


class Batches(Protocol):
    """Where tokens come from: position in, position out (`caddf.data.Batches`)."""

    def take(self, position: Position, rank: int = 0, world: int = 1) -> tuple[Int[Tensor, "b L"], Position]:
        """Process `rank`'s rows of the pass at `position`, and the next position."""


@dataclass(frozen=True)
class Result:
    """How a call of `train` ended.

    step: the last update. checkpoint: that of this step. best_step, best_nll: the best evaluation (nats per token).
    interrupted: a signal stopped it, and it can be resumed. finished_before: there was nothing left to do.
    """

    step: int
    checkpoint: Path
    tokens: int
    elapsed: float
    best_step: int | None = None
    best_nll: float | None = None
    interrupted: bool = False
    finished_before: bool = False


def train(
    run: Path,
    model: nn.Module,
    objective: Objective,
    batches: Batches,
    config: ResolvedTrainConfig,
    *,
    describe: dict[str, Any],
    tokenizer_file: Path | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    sample: Callable[[nn.Module], str] | None = None,
    console: Console | None = None,
    resume: bool = False,
) -> Result:
    """Trains `model`, in place, into the folder `run`; with `resume`, goes on from the latest checkpoint there.

    `batches` gives `config.rows_per_pass` rows over all processes. `describe` (with the model's settings under `model`)
    and `tokenizer_file` go into every checkpoint. `validate` (nats per token) and `sample` get the averaged weights;
    each process calls `validate`, the main one `sample`. On return the model holds the raw weights.

    SIGTERM and Ctrl-C finish the step, save and return; a second one aborts at once. Raises `TrainingError` where loss
    or gradient is not finite, and `InputError` for a run that cannot be resumed or started, or a full disk; whatever is
    raised, the checkpoints on disk stay whole.
    """
    accelerator = _accelerator(run, config)
    if config.rows_per_pass % accelerator.num_processes:
        raise InputError(
            f"train.batch_size is {config.batch_size} in {config.accumulation} passes; "
            f"the rows of a pass must be a multiple of the {accelerator.num_processes} processes"
        )
    checkpoints = Checkpoints(run / "checkpoints", config.keep)
    if not resume and checkpoints.steps():
        raise InputError(f"{run} holds a run already; resume it, or give another folder")

    training = _Training(accelerator, checkpoints, model, objective, batches, config)
    if resume:
        training.restore()
        if training.finished:
            return training.result(finished_before=True)
    run.mkdir(parents=True, exist_ok=True)
    log = RunLog(run, accelerator, console or Console(stderr=True), training.step, config.steps)
    with log, compiled_steps(model) if training.compiled else nullcontext(), _stop_signals() as stop:
        if not resume:
            training.save(describe, tokenizer_file)
        stopping = False
        while not (training.finished or stopping):
            training.update()
            log.advance(training.step)
            if training.due(config.log_every):
                training.report(log)
            if validate is not None and training.due(config.evaluate_every):
                training.validate(validate, log)
            if sample is not None and accelerator.is_main_process and training.due(config.sample_every):
                training.sample(sample, log)
            stopping = _any(accelerator, stop.requested)
            if stopping or training.is_best or training.due(config.checkpoint_every):
                training.save(describe, tokenizer_file)
        if not training.finished:
            log.say(f"stopped after step {training.step}; go on with: caddf train --resume {run}")
    return training.result(interrupted=not training.finished)


class _Training:
    """A model in training: its `state`, what moves it on by an update, and what is told and saved of it."""

    def __init__(
        self,
        accelerator: Accelerator,
        checkpoints: Checkpoints,
        model: nn.Module,
        objective: Objective,
        batches: Batches,
        config: ResolvedTrainConfig,
    ) -> None:
        self.accelerator, self.checkpoints, self.batches, self.config = accelerator, checkpoints, batches, config
        device, alone = accelerator.device, accelerator.num_processes == 1
        if config.precision == "fp64":
            model.double()
        one = _Pass(model, objective, _bf16(config, device))
        self.passes = accelerator.prepare(one)
        self.passes.train()
        self.compiled = compiles(config.compile, device)
        self.recorded: RecordedSteps | None = None
        if self.compiled and one.readable and device.type == "cuda" and alone and config.accumulation == 1:
            self.recorded = RecordedSteps(one.readings, one.read, list(model.parameters()))
        optimizer = build_optimizer(model, config.learning_rate, config.weight_decay, name=config.optimizer)
        own_seed = config.seed + 1_000_003 * accelerator.process_index  # no process has another seed's noise
        self.generator = torch.Generator().manual_seed(own_seed)
        self.state = TrainingState(model, optimizer, ema.start(model), self._generators(), Progress())
        self.begun = time.monotonic()

    @property
    def step(self) -> int:
        """The last update."""
        return self.state.progress.step

    @property
    def finished(self) -> bool:
        """Whether that was the last of all."""
        return self.step >= self.config.steps

    @property
    def is_best(self) -> bool:
        """Whether the evaluation at this step is the best so far."""
        return self.state.progress.best_step == self.step

    def due(self, every: int) -> bool:
        """Whether this is a step for what is done every so many steps, and at the last; 0 is never."""
        return every > 0 and (self.step % every == 0 or self.finished)

    def restore(self) -> None:
        """Goes back to the latest checkpoint; raises `InputError` where it cannot be resumed from."""
        self.checkpoints.restore(self.state)
        if self.accelerator.is_main_process:
            self.checkpoints.link(self.state.progress)  # a process that was killed may not have come to that
        own = self.state.generators[self.accelerator.process_index]
        self.generator.set_state(own.clone())  # set_state ignores the offset of a view
        self.begun = time.monotonic() - self.state.progress.elapsed

    def save(self, describe: dict[str, Any], tokenizer_file: Path | None) -> None:
        """A checkpoint of this step."""
        self.state.generators = self._generators()
        if self.accelerator.is_main_process:
            self.checkpoints.save(self.state, describe, tokenizer_file)
        self.accelerator.wait_for_everyone()

    def update(self) -> None:
        """One more update of the parameters and their average; raises `TrainingError` where it is not finite."""
        state, step = self.state, self.step + 1
        started = time.monotonic()
        rate = self._rate(step)
        for group in state.optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        measured, count, position = self._gradient()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.average = ema.updated(state.average, state.model, step, self.config.ema)
        measures = {**_numbers(measured), "tokens": count}  # waits for the device, which has its work by now
        if not (math.isfinite(measures["loss"]) and math.isfinite(measures["grad_norm"])):
            last = self.checkpoints.folder(self.checkpoints.steps()[-1])
            raise TrainingError(_not_finite(step, rate, measures, last))
        now = time.monotonic()
        measures["seconds"] = now - started
        state.progress = state.progress.after_update(position, measures, now - self.begun)

    def report(self, log: RunLog) -> None:
        """A line of metrics: the means since the line before."""
        log.report(_row(self.state.progress, self._rate(self.step)))
        self.state.progress = dataclasses.replace(self.state.progress, recent={})

    def validate(self, nats: Callable[[nn.Module], float], log: RunLog) -> None:
        """`nats` per token of the averaged weights; the mean over the processes, so that all agree on what is best."""
        nll = fmean(gather_object([self._of_average(nats)]))
        self.state.progress = self.state.progress.after_evaluation(nll)
        log.write({"step": self.step, "validation": nll, "tokens": self.state.progress.tokens})
        log.say(f"step {self.step}/{self.config.steps}  validation {nll:.4f} nats/token")

    def sample(self, draw: Callable[[nn.Module], str], log: RunLog) -> None:
        """A text that is drawn from the averaged weights."""
        text = self._of_average(draw)
        log.write({"step": self.step, "sample": text})
        log.say(f"step {self.step}/{self.config.steps}  sample\n{text}")

    def result(self, **ended: bool) -> Result:
        """How it ended."""
        at = self.state.progress
        folder = self.checkpoints.folder(at.step)
        return Result(at.step, folder, at.tokens, at.elapsed, at.best_step, at.best_nll, **ended)

    def _gradient(self) -> tuple[dict[str, Tensor], int, Position]:
        """The clipped gradient of one update, left in the parameters; what was measured, tokens, and the next position.

        Loss and tokens are those of all processes, the `parts/` this process's.
        """
        accelerator, config, position = self.accelerator, self.config, self.state.progress.position
        losses, parts, count = [], dict[str, list[Tensor]](), 0
        for i in range(config.accumulation):
            tokens, position = self.batches.take(position, accelerator.process_index, accelerator.num_processes)
            tokens = tokens.to(accelerator.device)
            if self.recorded is None:
                last = i == config.accumulation - 1
                with nullcontext() if last else accelerator.no_sync(self.passes):
                    loss, named = self.passes(tokens, self.generator)
                    accelerator.backward(loss / config.accumulation)
            else:
                loss, named = self.recorded(tokens, self.generator)
            losses.append(loss.detach())
            for name, part in named.items():
                parts.setdefault(name, []).append(part)
            count += tokens.numel() * accelerator.num_processes
        norm = accelerator.clip_grad_norm_(self.passes.parameters(), config.clip or math.inf)
        loss = accelerator.reduce(torch.stack(losses).mean(), "mean")
        means = {f"parts/{name}": torch.stack(values).mean() for name, values in parts.items()}
        return {"loss": loss, "grad_norm": norm, **means}, count, position

    def _rate(self, step: int) -> float:
        config = self.config
        return learning_rate_at(step, config.learning_rate, config.steps, config.warmup, config.min_ratio)

    def _of_average(self, read: Callable[[nn.Module], T]) -> T:
        with ema.averaged(self.state.model, self.state.average) as smooth, torch.no_grad(), as_it_is():
            return read(smooth)

    def _generators(self) -> Tensor:
        """The states of all processes' generators."""
        own = self.generator.get_state()[None].to(self.accelerator.device)
        return self.accelerator.gather(own).cpu()


class _Pass(nn.Module):
    """Tokens to loss in one forward call: autocast and the averaging of gradients then cover all that is computed."""

    def __init__(self, model: nn.Module, objective: Objective, bf16: bool) -> None:
        super().__init__()
        self.model, self.objective, self.bf16 = model, objective, bf16

    def forward(self, tokens: Int[Tensor, "B L"], generator: torch.Generator) -> Losses:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.objective(self.model, tokens, generator)  # type: ignore[arg-type]
        return loss.total, loss.parts

    @property
    def readable(self) -> bool:
        """Whether the objective says what it reads before it is read."""
        return isinstance(self.objective, ByReadings)

    def readings(self, tokens: Int[Tensor, "B L"], generator: torch.Generator) -> list[Reading]:
        """What it reads."""
        return cast(ByReadings, self.objective).readings(self.model, tokens, generator)  # type: ignore[arg-type]

    def read(self, readings: Sequence[Reading]) -> Losses:
        """The same of what an objective has drawn."""
        with torch.autocast(readings[0].x0.device.type, torch.bfloat16, enabled=self.bf16):
            loss = read(self.model, readings)  # type: ignore[arg-type]
        return loss.total, loss.parts


def _numbers(measures: dict[str, Tensor]) -> dict[str, float]:
    """What was measured, brought from the device at one go."""
    kind = finest(measures["loss"].device)
    values = torch.stack([each.detach().to(kind) for each in measures.values()])
    return dict(zip(measures, values.tolist(), strict=True))


def _row(progress: Progress, rate: float) -> dict[str, Any]:
    """A line of metrics: means since the line before, of a part over the updates that have it."""
    means = {name: fmean(values) for name, values in progress.recent.items()}
    return {
        "step": progress.step,
        "loss": means["loss"],
        "parts": {name.removeprefix("parts/"): mean for name, mean in means.items() if name.startswith("parts/")},
        "learning_rate": rate,
        "grad_norm": means["grad_norm"],
        "tokens": progress.tokens,
        "tokens_per_second": sum(progress.recent["tokens"]) / sum(progress.recent["seconds"]),
        "elapsed": progress.elapsed,
    }


def _not_finite(step: int, rate: float, measures: dict[str, float], last: Path) -> str:
    return (
        f"at step {step} the loss is {measures['loss']:g} and the gradient's norm {measures['grad_norm']:g} "
        f"(learning rate {rate:g}); {last} is intact: try a lower train.learning_rate or train.clip, "
        "a longer train.warmup, or train.precision fp32"
    )


def _accelerator(run: Path, config: ResolvedTrainConfig) -> Accelerator:
    available = {"auto": True, "cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
    if not available[config.device]:
        raise InputError(f"train.device is {config.device}, which this machine does not have; auto takes what is there")
    accelerator = Accelerator(
        cpu=config.device == "cpu",
        log_with="tensorboard" if config.tensorboard else None,
        project_dir=run,
        # A reading that a batch has no row of leaves its head without a gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if config.precision == "fp64" and accelerator.device.type == "mps":
        raise InputError("train.precision is fp64, which mps does not have; set train.device to cpu, or fp32")
    return accelerator


def _bf16(config: ResolvedTrainConfig, device: torch.device) -> bool:
    if config.precision == "auto":
        if device.type == "cpu":
            return torch.cpu._is_avx512_bf16_supported()  # elsewhere torch emulates it, many times slower than float32
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return config.precision == "bf16"


def _any(accelerator: Accelerator, flag: bool) -> bool:
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


@dataclass
class _Stop:
    requested: bool = False


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """The first SIGINT or SIGTERM sets the flag and puts the handlers before back: a second one acts at once."""
    stop = _Stop()
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def request(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        restore()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, request)
    try:
        yield stop
    finally:
        restore()
