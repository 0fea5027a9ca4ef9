"""What a run needs to go on bit for bit, and the checkpoints that hold it.

A checkpoint is a model folder (the averaged weights) with two more files: `training.safetensors` (parameters, optimiser
moments, generators) and `training.json` (`Progress`).
"""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor, nn
from torch.optim import Optimizer

from caddf.checkpoint import (
    atomic_folder,
    check_tensors,
    link_atomic,
    load_state,
    load_tensors,
    read_json,
    remove_folder,
    remove_leftovers,
    save_model,
    save_tensors,
    write_json_atomic,
)
from caddf.data.loader import Position
from caddf.errors import InputError
from caddf.training import ema


@dataclass(frozen=True)
class Progress:
    """Where a run stands after `step` updates.

    position: of the next batch. tokens: read so far. elapsed: seconds.
    best_step, best_nll: the evaluation with the lowest nats per token. recent: measures since the last log line.
    """

    position: Position = field(default_factory=Position)
    step: int = 0
    tokens: int = 0
    elapsed: float = 0.0
    best_step: int | None = None
    best_nll: float | None = None
    recent: dict[str, list[float]] = field(default_factory=dict)

    def after_update(self, position: Position, measures: dict[str, float], elapsed: float) -> Progress:
        """One step further; `measures` (with `tokens`) are kept until the next log line."""
        added = {name: [*self.recent.get(name, []), value] for name, value in measures.items()}
        return dataclasses.replace(
            self,
            position=position,
            step=self.step + 1,
            tokens=self.tokens + int(measures["tokens"]),
            elapsed=elapsed,
            recent=self.recent | added,
        )

    def after_evaluation(self, nll: float) -> Progress:
        """With the best evaluation moved here where `nll` (nats per token) is the lowest so far."""
        if not nll < (math.inf if self.best_nll is None else self.best_nll):
            return self
        return dataclasses.replace(self, best_step=self.step, best_nll=nll)


@dataclass
class TrainingState:
    """Everything that an update changes; `generators` is `[processes, bytes]`, one state per process."""

    model: nn.Module
    optimizer: Optimizer
    average: ema.Average
    generators: UInt8[Tensor, "P n"]
    progress: Progress


@dataclass(frozen=True)
class Checkpoints:
    """The folder of a run's checkpoints: `step-00000400` and so on, and the links `latest` and `best`."""

    root: Path
    keep: int

    def folder(self, step: int) -> Path:
        """The checkpoint of a step."""
        return self.root / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """The steps whose checkpoints are there, in order."""
        if not self.root.is_dir():
            return []
        names = (re.fullmatch(r"step-(\d+)", path.name) for path in self.root.iterdir() if path.is_dir())
        return sorted(int(name[1]) for name in names if name)

    def save(self, state: TrainingState, describe: dict[str, Any], tokenizer_file: Path | None) -> Path:
        """Writes a checkpoint whole or not at all, points the links at it, and deletes those no longer kept."""
        progress = state.progress
        with atomic_folder(self.folder(progress.step)) as folder:
            save_model(folder, {**state.model.state_dict(), **state.average}, describe)
            if tokenizer_file is not None:
                shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
            save_tensors(folder / "training.safetensors", _tensors(state))
            write_json_atomic(folder / "training.json", dataclasses.asdict(progress))
        self.link(progress)
        kept = {*self.steps()[-self.keep :]} | ({progress.best_step} if progress.best_step is not None else set())
        for step in set(self.steps()) - kept:
            remove_folder(self.folder(step))
        return self.folder(progress.step)

    def link(self, progress: Progress) -> None:
        """Points `latest` at the checkpoint of this step, and `best` at the best so far."""
        for name, step in (("latest", progress.step), ("best", progress.best_step)):
            link, target = self.root / name, None if step is None else self.folder(step).name
            if target is not None and not (link.is_symlink() and link.readlink().name == target):
                link_atomic(link, target)

    def restore(self, state: TrainingState) -> None:
        """Puts the latest checkpoint into `state`, and clears what a killed process left half-written.

        Raises `InputError` where there is none, or it is damaged, or it is another model's; then `state` is of no use.
        """
        if not self.steps():
            raise InputError(f"{self.root} has no checkpoint to resume from; start the run anew in a fresh folder")
        remove_leftovers(self.root)
        *before, latest = self.steps()
        try:
            self._restore(self.folder(latest), state)
        except InputError as error:
            usable = [step for step in reversed(before) if self._is_whole(self.folder(step))]
            advice = (
                f"remove {self.folder(latest)} to resume from {self.folder(usable[0])}"
                if usable
                else "no earlier checkpoint can be used"
            )
            raise InputError(f"{error}; {advice}") from None

    def _restore(self, folder: Path, state: TrainingState) -> None:
        values, tensors = self._read(folder)
        try:
            state.progress = Progress(**{**values, "position": Position(**values["position"])})
        except (KeyError, TypeError) as error:
            raise InputError(f"{folder / 'training.json'} is of another version ({error})") from None
        processes, needed = len(tensors.get("generators", ())), len(state.generators)
        if processes != needed:
            raise InputError(f"{folder} was saved by {processes} processes; {needed} cannot resume it")
        expected = {name: tensor.shape for name, tensor in _tensors(state).items()}
        for name, parameter in state.model.named_parameters():  # moments are there from a parameter's first gradient on
            shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
            for key, shape in shapes.items():
                if f"optimizer.{key}.{name}" in tensors:
                    expected[f"optimizer.{key}.{name}"] = shape  # type: ignore[assignment]
        check_tensors(folder / "training.safetensors", tensors, expected)

        load_state(state.model, folder)
        state.average = ema.start(state.model)
        with torch.no_grad():
            for name, parameter in state.model.named_parameters():
                parameter.copy_(tensors[f"parameters.{name}"])
        saved = state.optimizer.state_dict()
        saved["state"] = {}
        for i, name in enumerate(_names(state.optimizer)):
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{key}.{name}" in tensors]
            if keys:
                saved["state"][i] = {key: tensors[f"optimizer.{key}.{name}"] for key in keys}
        state.optimizer.load_state_dict(saved)
        state.generators = tensors["generators"]

    def _read(self, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return read_json(folder / "training.json"), load_tensors(folder / "training.safetensors")

    def _is_whole(self, folder: Path) -> bool:
        try:
            self._read(folder)
            load_tensors(folder / "model.safetensors")
        except InputError:
            return False
        return True


def _names(optimizer: Optimizer) -> list[str]:
    """The parameters' names in the order in which the optimiser's state numbers them."""
    return [name for group in optimizer.param_groups for name in group["param_names"]]


def _tensors(state: TrainingState) -> dict[str, Tensor]:
    tensors = {f"parameters.{name}": parameter for name, parameter in state.model.named_parameters()}
    names = _names(state.optimizer)
    for i, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{key}.{names[i]}": value for key, value in moments.items()}
    return {**tensors, "generators": state.generators}
