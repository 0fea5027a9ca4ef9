"""The thread that has the model: one batch at a time, of all waiting requests that can share it."""

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


class Call:
    """What else is done with the model, in its turn. `tell` gets what `function` returns, or what it raises."""

    def __init__(self, function: Callable[[], Any], tell: Callable[[Any], None]) -> None:
        self.function, self.tell = function, tell
        self.cancelled = threading.Event()

    def run(self) -> None:
        """Does it."""
        try:
            told = self.function()
        except Exception as error:
            told = error
        if not self.cancelled.is_set():
            self.tell(told)

    def fail(self, error: Exception) -> None:
        """Tells of what went wrong."""
        self.tell(error)


class Worker:
    """Decodes jobs in the order in which they came, at most `rows` rows (or one job's) at a time.

    A row's text does not depend on what else is in its batch, so that requests are batched without anyone's seeing it.
    """

    def __init__(self, decode: Decode, rows: int, waiting: int) -> None:
        self.decode, self.most, self.limit = decode, rows, waiting
        self.waiting: deque[Job | Call] = deque()
        self.changed = threading.Condition()
        self.stopped = False
        self.current: list[Job] | Call | None = None
        self.thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    def start(self) -> None:
        """Begins."""
        self.thread.start()

    def stop(self, timeout: float = 10.0) -> None:
        """Ends, after the step that is being decoded."""
        self.close()
        self.thread.join(timeout)

    def close(self) -> None:
        """Tells all that wait, and whom is being written for, that it ends. Does not wait."""
        with self.changed:
            self.stopped = True
            current = self.current if isinstance(self.current, list) else [] if self.current is None else [self.current]
            for each in [*self.waiting, *current]:
                each.fail(Busy("the server is stopping"))
                each.cancelled.set()
            self.waiting.clear()
            self.changed.notify()

    def submit(self, job: Job | Call) -> None:
        """Puts it at the end of what waits; raises `Busy` where too many do."""
        with self.changed:
            if self.stopped:
                raise Busy("the server is stopping")
            if len(self.waiting) >= self.limit:
                raise Busy(f"{self.limit} requests are waiting; try again later")
            self.waiting.append(job)
            self.changed.notify()

    def _run(self) -> None:
        while (work := self._next()) is not None:
            if isinstance(work, Call):
                work.run()
            else:
                self._write(work)

    def _next(self) -> list[Job] | Call | None:
        """The first that waits, with others that can share its batch; None at the end."""
        with self.changed:
            self.current = None
            while True:
                self.waiting = deque(each for each in self.waiting if not each.cancelled.is_set())
                if self.stopped or self.waiting:
                    break
                self.changed.wait()
            if self.stopped:
                return None
            first = self.waiting.popleft()
            self.current = first if isinstance(first, Call) else self._batch(first)
            return self.current

    def _batch(self, first: Job) -> list[Job]:
        """That job, and those that wait and can be decoded with it, of which nothing waits any more."""
        batch, count = [first], len(first.rows.texts)
        for job in [each for each in self.waiting if isinstance(each, Job)]:
            if job.rows.joins(first.rows) and count + len(job.rows.texts) <= self.most:
                batch.append(job)
                count += len(job.rows.texts)
                self.waiting.remove(job)
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
