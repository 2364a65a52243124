"""What the processes of a Ray cluster run in the tests."""

from __future__ import annotations

import os
import runpy
import signal
import threading
import time
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[2] / "examples" / "ddp" / "train.py"


def killed_once(folder: str, epochs: int) -> dict[str, Any]:
    """Run the example; the first time its second process is killed behind the third checkpoint."""
    mark = Path(folder) / "killed"
    if os.environ["RANK"] == "1" and not mark.exists():
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        threading.Thread(target=die_behind, args=(Path(folder, "checkpoints/step-00000150"),)).start()
    return runpy.run_path(str(EXAMPLE))["main"](folder=folder, epochs=epochs)


def die_behind(checkpoint: Path) -> None:
    while not checkpoint.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def mistaken() -> None:
    raise ValueError("a mistake in the function")
