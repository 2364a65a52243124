"""Processes of one group that may be killed, stopped and left: forks of one process that has imported torch.

Importing torch takes seconds of every process; a fork has it already. A fork that returns ends as an
interpreter does, with everything that happens then; one that raises shows the traceback and ends with 1.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def scenarios(module: str, folder: Path, timeout: float = 280.0) -> dict[str, Any]:
    """Run a module that plays scenarios in a folder; return what each came to."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "found.json").read_text())


def play(found: dict[str, Callable[[Path], Any]]) -> None:
    """Play scenarios, each in a folder of its own, and write down what they came to."""
    top, told = Path(sys.argv[1]), {}
    for name, scenario in found.items():
        (top / name).mkdir()
        told[name] = scenario(top / name)
    (top / "found.json").write_text(json.dumps(told))


@dataclass
class Ranks:
    """Processes that were forked together.

    Args:
        folder: Of what they say; must exist.
        world: How many.
        work: Called with rank, world and the file they meet by.
    """

    folder: Path
    world: int
    work: Callable[[int, int, Path], None]
    pids: list[int] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for rank in range(self.world):
            sys.stdout.flush()
            pid = os.fork()
            if not pid:
                out = os.open(self.folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(out, 1)
                os.dup2(out, 2)
                self.work(rank, self.world, self.folder / "store")
                sys.exit(0)
            self.pids.append(pid)

    def said(self, rank: int) -> str:
        path = self.folder / f"said-{rank}"
        return path.read_text() if path.exists() else ""

    def until(self, rank: int, text: str, limit: float = 30.0) -> None:
        """Wait until a process has said something."""
        end = time.monotonic() + limit
        while text not in self.said(rank):
            assert time.monotonic() < end, f"{rank} never said {text!r}: {self.said(rank)}"
            time.sleep(0.01)

    def signal(self, rank: int, what: signal.Signals) -> None:
        os.kill(self.pids[rank], what)

    def wait(self, ranks: Sequence[int] | None = None, limit: float = 90.0) -> float | None:
        """Wait for their end; None: it took too long, and they were killed."""
        begun = time.monotonic()
        left = set(range(self.world) if ranks is None else ranks) - self.codes.keys()
        while left and time.monotonic() < begun + limit:
            for rank in tuple(left):
                pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
                if pid:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
                    left.remove(rank)
            time.sleep(0.01)
        took = time.monotonic() - begun
        for rank in left:
            self.kill(rank)
        return None if left else took

    def kill(self, rank: int) -> None:
        os.kill(self.pids[rank], signal.SIGKILL)
        self.codes[rank] = os.waitstatus_to_exitcode(os.waitpid(self.pids[rank], 0)[1])

    def ended(self) -> dict[str, Any]:
        """Wait for all; return codes and words."""
        took = self.wait()
        codes = [self.codes[rank] for rank in range(self.world)]
        return {"took": took, "codes": codes, "said": [self.said(rank) for rank in range(self.world)]}
