"""What figures are measured on, and with."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from caddf.version import installed_version


def machine() -> dict[str, Any]:
    """Processor, GPU, versions, commit and date, as plain values."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "caddf": installed_version(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _commit() -> str | None:
    """Of the repository that this file is tracked in; None where there is none, or no git."""
    file = Path(__file__)
    try:
        for asked in (["ls-files", "--error-unmatch", file.name], ["rev-parse", "HEAD"]):
            git = subprocess.run(["git", *asked], cwd=file.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return git.stdout.strip()


def _processor() -> str:
    """Its name, where the system says it (Linux keeps it in `/proc/cpuinfo`)."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
