"""Jobs side by side on a CPU, each in a process of one thread: what comes of one does not depend on their number."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager

import torch
from rich.console import Console

from caddf.errors import Failure, InputError
from caddf.reproduce.plan import Job

CHILD = "from caddf.reproduce.workers import work; work({})"


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch with a single thread within the block. Several add up in another order, and train to other weights."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(jobs: Sequence[Job], workers: int, begins: Callable[[Job], None], ends: Callable[[Job], None]) -> bool:
    """Does `jobs`, `workers` at a time; False where one was interrupted.

    Where one fails, or on Ctrl-C or SIGTERM, the others are told to stop, and waited for: trainings save first. Raises
    a job's `InputError` or `Failure`, and `Failure` where its process ended otherwise.
    """
    left, running = list(jobs), dict[Future[bool], Job]()
    children = _Children()
    with ThreadPoolExecutor(workers) as pool, _terminated_as_interrupted():
        try:
            while left or running:
                while left and len(running) < workers:
                    begins(job := left.pop(0))
                    running[pool.submit(children.do, job)] = job
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    ends(running.pop(done))
                    if not done.result():
                        return False
        finally:
            children.stop()
    return True


class _Children:
    """Processes at work, until they are stopped. They are in sessions of their own: Ctrl-C reaches them as `stop`."""

    def __init__(self) -> None:
        self.stopped, self.lock = False, threading.Lock()
        self.working: list[subprocess.Popen[bytes]] = []

    def do(self, job: Job) -> bool:
        """Waits for a job in a process of its own."""
        with self.lock:
            if self.stopped:
                return False
            child = subprocess.Popen(
                [sys.executable, "-P", "-c", CHILD.format(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            self.working.append(child)
        answer, _ = child.communicate(pickle.dumps(job))
        if self.stopped:
            return False
        if child.returncode:
            killed = child.returncode == -signal.SIGKILL
            why = "killed, as happens where memory runs out: fewer --workers need less" if killed else "see above"
            raise Failure(f"{job.about}: its process ended with {child.returncode}: {why}")
        came = pickle.loads(answer)
        if isinstance(came, Exception):
            raise came
        return bool(came)

    def stop(self) -> None:
        """Tells those that still work to stop; none is begun after."""
        with self.lock:
            self.stopped = True
            for child in self.working:
                child.terminate()


def work(parent: int) -> None:
    """The process's side: does the job that comes in, and answers with what came of it; without its parent it stops."""
    answer, sys.stdout = sys.stdout.buffer, sys.stderr
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    job: Job = pickle.load(sys.stdin.buffer)
    came: bool | InputError | Failure
    try:
        with one_thread():
            came = job.do(Console(quiet=True))
    except (InputError, Failure) as error:
        came = error
    pickle.dump(came, answer)


def end_with(parent: int) -> None:
    """Tells this process to stop once its parent has ended, whatever ended it."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
