"""The `caddf` command, also as `python -m caddf`."""

import os
import signal
import sys


def main() -> int:
    """Runs the command line with threads that soon sleep while they wait, and without the hub library's warnings.

    GNU OpenMP's default is to spin for long, by which a busy machine slows training down tenfold instead of in
    proportion. It reads the variable when it is loaded, so it must be set before torch is imported; the hub library
    reads its own likewise, and what fails there is said in one sentence here.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    # Interrupted among imports, which take seconds, some of them would be tried again, and fail otherwise.
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    from caddf.cli import main as run

    signal.signal(signal.SIGINT, before)
    return run()


def _stop(*_: object) -> None:
    os.write(2, b"caddf: interrupted\n")
    os._exit(130)  # nothing has been begun


if __name__ == "__main__":
    sys.exit(main())
