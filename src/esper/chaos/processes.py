"""Start the process of a spec, or several that train together, and wait for the end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from esper.chaos.spec import Spec

GRACE = 40.0  # seconds; torch's launcher gives its processes 30 to end


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int | None  # None: it hung and was killed
    said: str  # the last line of its standard error that says something


def command(spec: Spec, path: Path) -> Sequence[str]:
    """Return what to start; several ranks are torch's launcher's, which starts all again if one is lost."""
    run = ["-m", "esper.chaos", str(path)]
    if spec.ranks > 1:
        count, again = f"--nproc-per-node={spec.ranks}", f"--max-restarts={spec.relaunches}"
        run = ["-m", "torch.distributed.run", "--standalone", count, again, *run]
    return [sys.executable, *run]


def run(spec: Spec, timeout: float | None) -> Ended:
    """Run it to its end, or to the end of patience."""
    place = Path(spec.marks).parent
    path, said = place / f"spec-{spec.attempt}.json", place / f"stderr-{spec.attempt}.txt"
    spec.write(path)
    with (
        open(said, "wb") as errors,
        subprocess.Popen(
            command(spec, path), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors
        ) as process,
    ):
        try:
            code: int | None = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
            process.terminate()  # so that a launcher ends its own
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
        except BaseException:  # interrupted: nothing may go on behind the user's back
            process.terminate()
            raise
    return Ended(code, last_words(said))


def last_words(path: Path) -> str:
    """Return the last error a process wrote, else its last line."""
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    errors = [line for line in lines if "Error: " in line]
    return next(iter([*errors[-1:], *lines[-1:]]), "it said nothing")
