"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

THREADS_PER_WORKER = 1  # torch's, in every process that trains: a second thread is slower on nets this small


def facts(workers: int) -> dict[str, object]:
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "workers": workers,
        "threads_per_worker": THREADS_PER_WORKER,
    }


def cpu_model() -> str | None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or None
    for line in cpuinfo.read_text(encoding="utf-8").splitlines():
        if line.lower().startswith("model name"):
            return line.partition(":")[2].strip()
    return None
