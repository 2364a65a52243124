"""The example in several processes, as its README says: killed or sharded, it ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "ddp" / "train.py"
EPOCHS = 12
STEPS = EPOCHS * 19
PATIENCE = 120


def launch(folder: Path, *more: str) -> subprocess.Popen[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    return subprocess.Popen(
        [sys.executable, *torchrun, str(EXAMPLE), "--folder", str(folder), "--epochs", str(EPOCHS), *more],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    try:
        told, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 0, told
    return told


def kill_one_behind(checkpoint: Path, process: subprocess.Popen[str]) -> None:
    """Kill the second process that torchrun has started, as soon as a checkpoint is there."""
    begun = time.monotonic()
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - begun < PATIENCE, f"no {checkpoint.name}"
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
    os.kill(int(children[1]), signal.SIGKILL)


@pytest.mark.slow
def test_two_processes_grow_one_model_and_a_killed_one_is_started_again(tmp_path: Path) -> None:
    whole, cut, sharded = tmp_path / "whole", tmp_path / "cut", tmp_path / "sharded"

    told = finish(launch(whole))

    assert "units more" in told
    assert f"after {STEPS} steps in 2 processes" in told
    assert float(told.split("accuracy ")[1].split()[0]) > 0.8
    process = launch(cut)
    kill_one_behind(cut / "checkpoints" / "step-00000100", process)
    finish(process)
    events = [json.loads(line) for line in (cut / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    (resumed,) = [event["step"] for event in events if event["kind"] == "resumed"]
    assert 100 <= resumed < STEPS
    finish(launch(sharded, "--fsdp"))
    weights = load_file(whole / "model" / "model.safetensors")
    for other in (cut, sharded):
        found = load_file(other / "model" / "model.safetensors")
        assert found.keys() == weights.keys()
        assert all(torch.equal(value, weights[name]) for name, value in found.items()), other.name
