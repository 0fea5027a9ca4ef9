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
from typing import Any, Protocol, cast

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
    rank, world = accelerator.process_index, accelerator.num_processes
    if config.rows_per_pass % world:
        raise InputError(
            f"train.batch_size is {config.batch_size} in {config.accumulation} passes; "
            f"the rows of a pass must be a multiple of the {world} processes"
        )
    checkpoints = Checkpoints(run / "checkpoints", config.keep)
    if not resume and checkpoints.steps():
        raise InputError(f"{run} holds a run already; resume it, or give another folder")

    if config.precision == "fp64":
        model.double()
    one = _Pass(model, objective, _bf16(config, accelerator.device))
    update = accelerator.prepare(one)
    update.train()
    optimizer = build_optimizer(model, config.learning_rate, config.weight_decay, name=config.optimizer)
    generator = torch.Generator().manual_seed(config.seed + 1_000_003 * rank)  # no process has another seed's noise
    state = TrainingState(model, optimizer, ema.start(model), _gathered(accelerator, generator), Progress())
    if resume:
        checkpoints.restore(state)
        if accelerator.is_main_process:
            checkpoints.link(state.progress)  # a process that was killed may not have come to that
        generator.set_state(state.generators[rank].clone())  # set_state ignores the offset of a view
        if state.progress.step >= config.steps:
            return _result(checkpoints, state.progress, finished_before=True)

    def save() -> None:
        state.generators = _gathered(accelerator, generator)
        if accelerator.is_main_process:
            checkpoints.save(state, describe, tokenizer_file)
        accelerator.wait_for_everyone()

    begun = time.monotonic() - state.progress.elapsed
    run.mkdir(parents=True, exist_ok=True)
    log = RunLog(run, accelerator, console or Console(stderr=True), state.progress.step, config.steps)
    compiled = compiles(config.compile, accelerator.device)
    recorded = None
    if compiled and one.readable and accelerator.device.type == "cuda" and world == config.accumulation == 1:
        recorded = RecordedSteps(one.readings, one.read, list(model.parameters()))
    with log, compiled_steps(model) if compiled else nullcontext(), _stop_signals() as stop:
        if not resume:
            save()
        stopping = False
        while state.progress.step < config.steps and not stopping:
            step = state.progress.step + 1
            started = time.monotonic()
            rate = learning_rate_at(step, config.learning_rate, config.steps, config.warmup, config.min_ratio)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            position = state.progress.position
            measured, count, position = _gradient(accelerator, update, recorded, batches, position, generator, config)
            optimizer.step()
            optimizer.zero_grad()
            state.average = ema.updated(state.average, model, step, config.ema)
            measures = {**_numbers(measured), "tokens": count}  # waits for the device, which has its work by now
            if not (math.isfinite(measures["loss"]) and math.isfinite(measures["grad_norm"])):
                raise TrainingError(_not_finite(step, rate, measures, checkpoints.folder(checkpoints.steps()[-1])))

            now = time.monotonic()
            measures["seconds"] = now - started
            state.progress = state.progress.after_update(position, measures, now - begun)
            log.advance(step)
            if step % config.log_every == 0 or step == config.steps:
                log.report(_row(state.progress, rate))
                state.progress = dataclasses.replace(state.progress, recent={})
            if validate is not None and _due(step, config.evaluate_every, config.steps):
                nll = _validation(accelerator, state, validate)
                state.progress = state.progress.after_evaluation(nll)
                log.write({"step": step, "validation": nll, "tokens": state.progress.tokens})
                log.say(f"step {step}/{config.steps}  validation {nll:.4f} nats/token")
            if sample is not None and accelerator.is_main_process and _due(step, config.sample_every, config.steps):
                with ema.averaged(model, state.average) as smooth, torch.no_grad(), as_it_is():
                    text = sample(smooth)
                log.write({"step": step, "sample": text})
                log.say(f"step {step}/{config.steps}  sample\n{text}")
            stopping = _any(accelerator, stop.requested)
            if stopping or state.progress.best_step == step or _due(step, config.checkpoint_every, config.steps):
                save()
        interrupted = state.progress.step < config.steps
        if interrupted:
            log.say(f"stopped after step {state.progress.step}; go on with: caddf train --resume {run}")
    return _result(checkpoints, state.progress, interrupted=interrupted)


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


def _gradient(
    accelerator: Accelerator,
    update: nn.Module,
    recorded: RecordedSteps | None,
    batches: Batches,
    position: Position,
    generator: torch.Generator,
    config: ResolvedTrainConfig,
) -> tuple[dict[str, Tensor], int, Position]:
    """The clipped gradient of one update, left in the parameters; what was measured, tokens, and the next position.

    Loss and tokens are those of all processes, the `parts/` this process's.
    """
    losses, parts, count = [], dict[str, list[Tensor]](), 0
    for i in range(config.accumulation):
        tokens, position = batches.take(position, accelerator.process_index, accelerator.num_processes)
        tokens = tokens.to(accelerator.device)
        if recorded is None:
            last = i == config.accumulation - 1
            with nullcontext() if last else accelerator.no_sync(update):
                loss, named = update(tokens, generator)
                accelerator.backward(loss / config.accumulation)
        else:
            loss, named = recorded(tokens, generator)
        losses.append(loss.detach())
        for name, part in named.items():
            parts.setdefault(name, []).append(part)
        count += tokens.numel() * accelerator.num_processes
    norm = accelerator.clip_grad_norm_(update.parameters(), config.clip or math.inf)
    loss = accelerator.reduce(torch.stack(losses).mean(), "mean")
    means = {f"parts/{name}": torch.stack(values).mean() for name, values in parts.items()}
    return {"loss": loss, "grad_norm": norm, **means}, count, position


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


def _validation(accelerator: Accelerator, state: TrainingState, validate: Callable[[nn.Module], float]) -> float:
    """`validate` on the averaged weights; the mean over the processes, so that all agree on what is best."""
    with ema.averaged(state.model, state.average) as smooth, torch.no_grad(), as_it_is():
        nll = validate(smooth)
    return fmean(gather_object([nll]))


def _due(step: int, every: int, steps: int) -> bool:
    return every > 0 and (step % every == 0 or step == steps)


def _not_finite(step: int, rate: float, measures: dict[str, float], last: Path) -> str:
    return (
        f"at step {step} the loss is {measures['loss']:g} and the gradient's norm {measures['grad_norm']:g} "
        f"(learning rate {rate:g}); {last} is intact: try a lower train.learning_rate or train.clip, "
        "a longer train.warmup, or train.precision fp32"
    )


def _result(checkpoints: Checkpoints, progress: Progress, **ended: bool) -> Result:
    return Result(
        progress.step,
        checkpoints.folder(progress.step),
        progress.tokens,
        progress.elapsed,
        progress.best_step,
        progress.best_nll,
        **ended,
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


def _gathered(accelerator: Accelerator, generator: torch.Generator) -> Tensor:
    return accelerator.gather(generator.get_state()[None].to(accelerator.device)).cpu()


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
