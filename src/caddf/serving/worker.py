"""The thread that decodes: one batch at a time, of all waiting requests that can share it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from caddf.errors import Failure
from caddf.serving.requests import Rows
from caddf.snapshots import Snapshot

Decode = Callable[..., Iterator[Snapshot]]
"""`caddf.generate` of a model."""


class Busy(Failure):
    """More is waiting than the server keeps waiting."""


@dataclass(frozen=True)
class Step:
    """How far a request has come: a step of the decoder, and where its rows are in the batch.

    `last` says that all of them are complete.
    """

    frame: Snapshot
    first: int
    count: int
    last: bool

    @property
    def rows(self) -> range:
        """The request's rows."""
        return range(self.first, self.first + self.count)


class Job:
    """A request that waits or is decoded. `tell` gets a value for each step, or the exception that ended it.

    `read` makes the values, in the thread that decodes. Whoever no longer listens sets `cancelled`.
    """

    def __init__(self, rows: Rows, read: Callable[[Step], Any], tell: Callable[[Any], None]) -> None:
        self.rows, self.read, self.tell = rows, read, tell
        self.cancelled = threading.Event()
        self.over = False

    def step(self, step: Step) -> None:
        """Tells of a step, unless nobody listens or the last was told before."""
        if self.over or self.cancelled.is_set():
            self.over = True
            return
        self.over = step.last
        self.tell(self.read(step))

    def fail(self, error: Exception) -> None:
        """Tells of what went wrong."""
        if not self.over and not self.cancelled.is_set():
            self.tell(error)
        self.over = True


class Worker:
    """Decodes jobs in the order in which they came, at most `rows` rows (or one job's) at a time.

    A row's text does not depend on what else is in its batch, so that requests are batched without anyone's seeing it.
    """

    def __init__(self, decode: Decode, rows: int, waiting: int) -> None:
        self.decode, self.most, self.limit = decode, rows, waiting
        self.waiting: deque[Job] = deque()
        self.changed = threading.Condition()
        self.model = threading.Lock()
        self.stopped = False
        self.current: list[Job] = []
        self.thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    def start(self) -> None:
        """Begins."""
        self.thread.start()

    def stop(self, timeout: float = 10.0) -> None:
        """Ends, after the step that is being decoded; what waits is dropped."""
        with self.changed:
            self.stopped = True
            for job in [*self.waiting, *self.current]:
                job.cancelled.set()
            self.waiting.clear()
            self.changed.notify()
        self.thread.join(timeout)

    def submit(self, job: Job) -> None:
        """Puts a job at the end of what waits; raises `Busy` where too many do."""
        with self.changed:
            if len(self.waiting) >= self.limit:
                raise Busy(f"{self.limit} requests are waiting; try again later")
            self.waiting.append(job)
            self.changed.notify()

    def _run(self) -> None:
        while batch := self._next():
            with self.model:
                self._write(batch)

    def _next(self) -> list[Job]:
        """The first that waits, and others that can share its batch; none at the end."""
        with self.changed:
            self.current = []
            while True:
                waiting = [job for job in self.waiting if not job.cancelled.is_set()]
                if self.stopped or waiting:
                    break
                self.changed.wait()
            if self.stopped:
                return []
            first, *others = waiting
            batch, count = [first], len(first.rows.texts)
            for job in others:
                if job.rows.joins(first.rows) and count + len(job.rows.texts) <= self.most:
                    batch.append(job)
                    count += len(job.rows.texts)
            self.waiting = deque(job for job in waiting if job not in batch)
            self.current = batch
            return batch

    def _write(self, batch: list[Job]) -> None:
        """Decodes until every job of the batch is over."""
        try:
            for frame in self.decode(**batch[0].rows.with_([job.rows for job in batch[1:]])):
                ended, first = frame.ended, 0
                for job in batch:
                    count = len(job.rows.texts)
                    job.step(Step(frame, first, count, all(ended[first : first + count])))
                    first += count
                if all(job.over for job in batch):
                    return
        except Exception as error:  # whatever it is, whoever waits must hear of it, and the next batch be decoded
            for job in batch:
                job.fail(error)
