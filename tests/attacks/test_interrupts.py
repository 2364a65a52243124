"""A9: Ctrl-C at any line of Esper's leaves loop and model whole: 20 more steps, then finish()."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.attacks.interrupted import CALLS

QUICK = {"commits": 24, "is let in": 6, "ends": 12, "ends while it learns": 8}
EVERY = 60  # lines of a call, spread over it
EXHAUSTIVE = [pytest.mark.slow, pytest.mark.exhaustive]


@pytest.mark.parametrize(
    ("recipe", "name", "points"),
    [
        pytest.param(recipe, name, points, marks=[] if points < EVERY else EXHAUSTIVE)
        for recipe, calls in CALLS.items()
        for name in calls
        for points in sorted({QUICK.get(name, EVERY), EVERY})
    ],
)
@pytest.mark.parametrize("host", ["pair"])
def test_an_interrupt_at_any_line(
    host: str, recipe: str, name: str, points: int, count: Callable[..., None]
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.attacks.interrupted", host, recipe, name, str(points)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    count(told["tries"], len(told["faults"]))
    assert told["faults"] == []
