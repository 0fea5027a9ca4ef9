"""The `caddf` command, also as `python -m caddf`."""

import os
import sys


def main() -> int:
    """Runs the command line with threads that sleep while they wait.

    OpenMP's default is to spin, by which a busy machine slows training down tenfold instead of in proportion. It reads
    the variable when it is loaded, so it must be set before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from caddf.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
