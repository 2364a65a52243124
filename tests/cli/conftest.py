"""Commands are run as processes; the runs they read are those of tests/nissa."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location(
    "nissa_runs", Path(__file__).parents[1] / "nissa" / "conftest.py"
)
_runs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_runs)
events, run = _runs.events, _runs.run

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def esper(tmp_path: Path) -> Command:
    """Run ``esper`` in an empty folder, as a user would."""

    def command(
        *arguments: object, cwd: Path = tmp_path, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-W", "error", "-m", "esper", *map(str, arguments)]
        env = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **environment}
        return subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, check=False)

    return command
