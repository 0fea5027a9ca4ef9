"""Ctrl-C while the package itself is imported."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM, as shells have it."""


@contextmanager
def stopping() -> Iterator[None]:
    """Ends the process at once where it is interrupted among imports, some of which would be tried again, and fail."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _stop(*_: object) -> None:
    os.write(2, b"caddf: interrupted\n")
    os._exit(INTERRUPTED)  # nothing has been begun
