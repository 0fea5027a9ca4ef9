"""`python -m caddf` is the `caddf` command."""

import sys

from caddf.cli import main

if __name__ == "__main__":
    sys.exit(main())
