"""What a run tells: metrics as JSONL and for TensorBoard; a progress bar, or plain lines without a terminal."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from caddf.checkpoint import saving, write_text_atomic


def truncate_metrics(path: Path, step: int) -> None:
    """Drops rows after `step`, and what a killed process left of a row, so that a resumed curve has each step once."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    write_text_atomic(path, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


class RunLog:
    """`RUN/metrics.jsonl`, `RUN/tensorboard/` and the console, from `step` on; only the main process says anything."""

    def __init__(self, run: Path, accelerator: Accelerator, console: Console, step: int, steps: int) -> None:
        self.path, self.accelerator, self.steps = run / "metrics.jsonl", accelerator, steps
        self.main = accelerator.is_main_process
        self.console = console if self.main else Console(quiet=True)
        self.began, self.first = time.monotonic(), step
        if self.main:
            truncate_metrics(self.path, step)
        accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": step + 1}})
        columns = ("loss {task.fields[loss]}", "{task.fields[speed]} tokens/s", "left")
        self.bar = Progress(
            BarColumn(None),
            MofNCompleteColumn(),
            *(TextColumn(text) for text in columns),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("", total=steps, completed=step, loss="-", speed="-")

    def __enter__(self) -> RunLog:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.stop()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def write(self, row: dict[str, Any]) -> None:
        """One object with a `step`; numbers and text go to TensorBoard too, `parts` one by one."""
        if not self.main:
            return
        with saving(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        values = {name: value for name, value in row.items() if name not in ("step", "parts")}
        self.accelerator.log(
            values | {f"parts/{name}": value for name, value in row.get("parts", {}).items()}, row["step"]
        )

    def advance(self, step: int) -> None:
        """Moves the bar."""
        self.bar.update(self.task, completed=step)

    def report(self, row: dict[str, Any]) -> None:
        """Writes a row of training metrics and shows loss, speed and time left."""
        self.write(row)
        step, loss, speed = row["step"], f"{row['loss']:.4f}", f"{row['tokens_per_second']:,.0f}"
        self.bar.update(self.task, loss=loss, speed=speed)
        if not self.console.is_terminal:
            left = (time.monotonic() - self.began) / (step - self.first) * (self.steps - step)
            self.say(f"step {step}/{self.steps}  loss {loss}  {speed} tokens/s  {_clock(left)} left")

    def say(self, text: str) -> None:
        """A line of plain text."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
