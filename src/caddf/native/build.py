"""The C kernels as a library: compiled once for this machine, at their first use, and kept in the user's cache."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from caddf.native.structures import compare

SOURCE = Path(__file__).with_name("rounds.c")  # which includes the others
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC", "-pthread")
COMPILERS = ("cc", "gcc", "clang")
KEPT = 30 * 24 * 3600
"""For how many seconds a library that nobody loads outlasts the building of others."""


class BuildError(Exception):
    """There is no library: no C compiler, or one that cannot compile it; says why in one line."""


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels. Raises `BuildError`."""
    try:
        made = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(" ".join(str(error).split())) from None
    compare(made)
    return _declared(made)


def _built() -> Path:
    compiler = shlex.split(os.environ.get("CC", "")) or list(filter(shutil.which, COMPILERS))[:1]
    if not compiler or shutil.which(compiler[0]) is None:
        raise BuildError(f"no {compiler[0]}" if compiler else f"no C compiler ({', '.join(COMPILERS)}) is here")
    sources = (path.read_text() for path in sorted(SOURCE.parent.glob("*.c")))
    made_of = "\n".join((*sources, *compiler, *FLAGS, platform.machine(), _processor()))
    path = _cache() / f"kernels-{hashlib.sha256(made_of.encode()).hexdigest()[:20]}.so"
    with suppress(OSError):
        os.utime(path)  # in use
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / "kernels.so"
            _compile(compiler, made)
            os.replace(made, path)
        _clear(path.parent)
    return path


def _clear(folder: Path) -> None:
    """Deletes libraries that have not been used for long."""
    for path in folder.glob("kernels-*.so"):
        with suppress(OSError):
            if path.stat().st_mtime < time.time() - KEPT:
                path.unlink()


def _compile(compiler: list[str], made: Path) -> None:
    """With OpenMP where the compiler has it, else by one thread."""
    said = ""
    for openmp in (["-fopenmp"], []):
        command = [*compiler, *FLAGS, *openmp, "-o", str(made), str(SOURCE), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode == 0:
            return
        said = next((line for line in done.stderr.splitlines() if "error" in line), f"{compiler[0]} failed")
    raise BuildError(said.strip())


def _processor() -> str:
    """What the machine's instructions depend on: a cache may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines[:60] if line.startswith(("flags", "model name", "Features", "CPU part")))


def _cache() -> Path:
    """The user's cache folder, or where that cannot be written to, a new one that goes with this process."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "caddf"
    with suppress(OSError):
        home.mkdir(parents=True, exist_ok=True)
        if os.access(home, os.W_OK):
            return home
    folder = tempfile.mkdtemp(prefix="caddf-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.caddf_stack.argtypes, library.caddf_stack.restype = [pointer, pointer], ctypes.c_int
    library.caddf_fuse.argtypes, library.caddf_fuse.restype = [pointer, pointer], ctypes.c_int
    library.caddf_prepare.argtypes, library.caddf_prepare.restype = [pointer, number], None
    library.caddf_draft.argtypes, library.caddf_draft.restype = [pointer, pointer], ctypes.c_int
    library.caddf_round.argtypes, library.caddf_round.restype = [pointer], ctypes.c_int
    library.caddf_map.argtypes, library.caddf_map.restype = [pointer, number, pointer, pointer, number], None
    return library
