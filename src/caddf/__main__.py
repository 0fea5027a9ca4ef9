"""The `caddf` command, also as `python -m caddf`."""

import os
import sys

from caddf.interrupted import stopping


def main() -> int:
    """Runs the command line with threads that soon sleep while they wait, and without the hub library's warnings.

    GNU OpenMP's default is to spin for long, by which a busy machine slows training down tenfold instead of in
    proportion. It reads the variable when it is loaded, so it must be set before torch is imported; the hub library
    reads its own likewise, and what fails there is said in one sentence here.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    with stopping():
        from caddf.cli import main as run
    return run()


if __name__ == "__main__":
    sys.exit(main())
