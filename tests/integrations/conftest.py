"""A Ray cluster of this machine, which asks for a token as a real one does."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

TOKEN = secrets.token_hex(32)  # one for the process: Ray reads it once


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)  # or it writes one into the home folder
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")  # or it phones home
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    for left in ("PYTHONBREAKPOINT", "RAY_CLIENT_MODE", "RAY_TRAIN_V2_ENABLED"):  # by Ray, on import
        monkeypatch.setenv(left, "")
        monkeypatch.delenv(left)
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()
