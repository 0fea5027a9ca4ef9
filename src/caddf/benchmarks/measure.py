"""How time, memory and bandwidth are measured, and what is said of repeated measurements."""

from __future__ import annotations

import pickle
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")
CHILD = "import pickle, sys; function, given = pickle.load(sys.stdin.buffer); given = function(*given)\n"
CHILD += "pickle.dump(given, sys.stdout.buffer)"
READ = 1 << 28
"""Bytes that the bandwidth is measured on: more than a processor's caches hold (a GPU reads four times as much)."""


def in_turns(rows: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """Every row once, then every row again: what the machine does meanwhile hits all rows alike."""
    for turn in range(rounds):
        for row in rows:
            yield turn, row


def now(device: torch.device) -> float:
    """Seconds on a clock, once all work given to `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class Spread:
    """The median of repeated measurements, and the quartiles about it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Quartiles by linear interpolation; of a single value, that value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    @classmethod
    def ratio(cls, above: Sequence[float], below: Sequence[float]) -> Spread:
        """Of the ratios within each round, in which a slow minute of the machine cancels."""
        return cls.of([a / b for a, b in zip(above, below, strict=True)])


def bandwidth(device: torch.device, repeats: int = 3) -> float:
    """Bytes per second that `device` reads: the best of a sum and a matrix-vector product over a large tensor."""
    columns = 1 << 12
    x = torch.ones(READ * (4 if device.type == "cuda" else 1) // 4 // columns, columns, device=device)
    v = torch.ones(columns, device=device)
    seconds = []
    for _ in range(repeats):
        for read in (x.sum, lambda: torch.mv(x, v)):
            begun = now(device)
            read()
            seconds.append(now(device) - begun)
    return x.nbytes / min(seconds)


@dataclass
class Peak:
    """Bytes: what was there at first, and the most that there was."""

    first: int = 0
    most: int = 0


@contextmanager
def allocated(device: torch.device) -> Iterator[Peak]:
    """The peak of the GPU's allocator within the block."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    peak = Peak(first=torch.cuda.memory_allocated(device))
    yield peak
    torch.cuda.synchronize(device)
    peak.most = torch.cuda.max_memory_allocated(device)


@contextmanager
def resident(every: float = 1e-3) -> Iterator[Peak]:
    """The peak of this process's resident memory within the block, looked at every millisecond by a thread.

    Meant for a `fresh` process: elsewhere memory that was freed before, and is used again, does not show.
    """
    import psutil

    process, done = psutil.Process(), threading.Event()
    peak = Peak(first=process.memory_info().rss)

    def watch() -> None:
        while not done.is_set():
            peak.most = max(peak.most, process.memory_info().rss)
            done.wait(every)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def fresh(function: Callable[..., T], *given: Any) -> T:
    """`function(*given)` in a process of its own, which nothing has used memory in before.

    Raises `RuntimeError` with what the process said last, where it ended otherwise than by returning.
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD], input=pickle.dumps((function, given)), capture_output=True
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        why = "killed, as happens where memory runs out" if done.returncode == -signal.SIGKILL else "no word"
        raise RuntimeError(f"{function.__name__} ended with {done.returncode}: {said[-1] if said else why}")
    result: T = pickle.loads(done.stdout)
    return result
