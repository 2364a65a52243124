"""kill -9 at random instants, the same command again, and in the end the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("killable.py")
KILLS = 10


class Attempt:
    """One process of the run; its lines are read as they come."""

    def __init__(self, folder: Path, workers: int, pause: float) -> None:
        command = [sys.executable, "-W", "error", str(PROGRAM), str(folder), str(workers), "3", str(pause)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.first = self.process.stdout.readline()  # it has resumed

    def killed(self, after: float) -> bool:
        """Kill it; False where it was faster."""
        try:
            self.process.wait(after)
        except subprocess.TimeoutExpired:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.communicate()
        return self.process.returncode == -signal.SIGKILL

    def end(self) -> dict[str, Any]:
        out, err = self.process.communicate()
        assert self.process.returncode == 0, err
        return json.loads(out.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(workers: int, tmp_path: Path) -> None:
    whole = Attempt(tmp_path / "whole", workers, 0.0).end()
    assert whole["grown"] > 1
    draw = random.Random(workers)
    resumed = []
    while len(resumed) < KILLS:
        attempt = Attempt(tmp_path / "cut", workers, 0.05)
        assert attempt.first, attempt.process.communicate()[1]
        resumed.append(json.loads(attempt.first)["resumed"])
        assert attempt.killed(draw.uniform(0.05, 0.8))
        time.sleep(0.01)
    last = Attempt(tmp_path / "cut", workers, 0.0)
    assert json.loads(last.first)["resumed"] >= max(step or 0 for step in resumed)
    found = last.end()
    assert found["digest"] == whole["digest"]
    assert found["told"] == []
    assert not list((tmp_path / "cut" / "checkpoints").glob(".*"))
