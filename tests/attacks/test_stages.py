"""A4: a model is traced, copied, hooked, moved and saved in every stage of growth, and no process dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.attacks.staged import HOSTS, STOPS


@pytest.mark.parametrize(
    ("host", "recipe"),
    [
        pytest.param(
            host,
            recipe,
            marks=[]
            if (host, recipe) == ("pair", "incubate")
            else [pytest.mark.slow, pytest.mark.exhaustive],
        )
        for recipe in STOPS
        for host in HOSTS
    ],
)
def test_whatever_is_done_to_a_model_works_or_is_refused(
    host: str, recipe: str, count: Callable[..., None]
) -> None:
    paths = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, "-m", "tests.attacks.staged", host, recipe],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    count(told["tries"], len(told["faults"]))
    assert told["faults"] == []
    assert told["tries"] >= 40 * len(STOPS[recipe])
