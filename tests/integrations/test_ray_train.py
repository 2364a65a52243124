"""The example runs on a Ray cluster of one node, is killed there, and goes on by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from esper.errors import ConfigError, ProcessError
from tests.integrations import ray_runs

EPOCHS = 40


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")  # Ray's own: sockets it leaves open, what it will rename
@pytest.mark.usefixtures("cluster")
def test_a_run_on_a_cluster_that_loses_a_process_goes_on_by_itself(tmp_path: Path) -> None:
    pytest.importorskip("ray.train", exc_type=ImportError)  # its own dependencies
    from esper.integrations.ray.train import train

    for wrong in ({"workers": 0}, {"workers": (3, 2)}, {"restarts": -1}):
        with pytest.raises(ConfigError):
            train(ray_runs.killed_once, **wrong)
    run = tmp_path / "run"

    found = train(
        ray_runs.killed_once,
        {"folder": str(run), "epochs": EPOCHS},
        workers=2,
        restarts=1,
        storage=tmp_path / "notes",
    )

    assert found["from"] >= 150  # the step from which it went on
    assert found["steps"] == EPOCHS * 19
    assert found["accuracy"] > 0.8
    events = [json.loads(line) for line in (run / "events.jsonl").read_text("utf-8").splitlines()]
    assert [event["step"] for event in events if event["kind"] == "resumed"] == [found["from"]]
    with pytest.raises(ProcessError, match=r"failed 1 times[\s\S]*a mistake in the function"):
        train(ray_runs.mistaken, workers=1, restarts=0, storage=tmp_path / "notes")
