"""Does a killed run come back by itself, with the same bits, and how fast: 100 kills, 10 M parameters?"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import compare, harness
from benchmarks.promises import Promise

NAME = "recovery"
KILLS = 100
CLASSES, EPOCHS, BATCH = 8, 10, 32
WIDE = 3160  # a square layer of 10 M parameters
STARTING = (0.0, 5.0)  # seconds after the start of a process within which it is killed
TRAINING = (0.0, 1.0)  # and after its first step


def main(argv: Sequence[str]) -> int:
    """Kill one growing run again and again, compare its bits; then time a large one's way back."""
    if argv[:1] == ["--child"]:
        return child(Path(argv[1]), int(argv[2]), int(argv[3]), float(argv[4]))
    chosen = harness.options(NAME, __doc__, argv, seeds=1)
    kills = 3 if chosen.quick else KILLS
    folder = Path(tempfile.mkdtemp(prefix="esper-recovery-"))
    try:
        small = survive(folder, kills)
        large = comes_back(folder, 2 if chosen.quick else 5)
    finally:
        shutil.rmtree(folder)
    back = {p: float(np.percentile(small["back"], p)) for p in (50, 99)}
    table = compare.titled(f"{kills} kills of one run that grows", ["", "p50", "p99"])
    table.add_row(
        "seconds from the start of the process to its first step", *(f"{v:.2f}" for v in back.values())
    )
    for name in ("killed", "while saving", "failed", "runs", "grown"):
        table.add_row(name, str(small[name]), "")
    wide = compare.titled("10 M parameters with Adam, 120 MB", ["", "worst"])
    for name, value in large.items():
        wide.add_row(name, f"{value:.3f}")
    judged = [
        Promise("kills after which the run came back by itself", 1.0 - small["failed"] / kills, ">=", 1.0),
        Promise("final weights equal, bit for bit", float(small["equal"]), ">=", 1.0, digits=0),
        Promise(
            "10 M parameters: s to the first step beyond importing torch", large["seconds to step"], "<=", 5.0
        ),
        Promise("10 M parameters: share of the run checkpoints take", large["share"], "<=", 0.015),
        Promise("10 M parameters: stall in steps", large["stall in steps"], "<=", 1.0),
    ]
    return harness.conclude(NAME, chosen, [table, wide], judged, {"small": small, "large": large})


def start(folder: Path, wide: int, until: int) -> subprocess.Popen[str]:
    """Start the run's program, which finds its checkpoints by itself."""
    given = [str(folder), str(wide), str(until), repr(time.monotonic())]
    command = [sys.executable, "-m", "benchmarks.recovery", "--child", *given]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[1]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, env=env)


def read(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Read the next line the program prints; an empty one if it ended."""
    assert process.stdout is not None
    line = process.stdout.readline()
    return json.loads(line) if line else {}


def survive(folder: Path, kills: int) -> dict[str, Any]:
    """Kill a run, start it again, and compare the end with one that nobody killed."""
    with start(folder / "whole", 0, 0) as whole:
        first, want = read(whole), read(whole)
    draw = random.Random(0)
    back, inside = [first["back"]], 0
    begun = failed = killed = 0
    while killed < kills and not failed:
        with start(folder / f"cut{begun}", 0, 0) as process:
            early = draw.random() < 0.2  # while it starts, or while it resumes
            found = {} if early else read(process)
            if found:
                back.append(found["back"])
            time.sleep(draw.uniform(*(STARTING if early else TRAINING)))
            failed += process.poll() not in (None, 0)
            process.kill()
            ended = process.communicate()[0].splitlines()
        killed += process.returncode == -signal.SIGKILL
        inside += any((folder / f"cut{begun}").glob(".*"))  # a checkpoint was being written
        if process.returncode == 0:  # the run was faster than its killer: compare, and go on with another one
            failed += json.loads(ended[-1])["digest"] != want["digest"]
            begun += 1
    with start(folder / f"cut{begun}", 0, 0) as last:
        resumed, found = read(last), read(last)
    equal = bool(resumed) and not failed and found.get("digest") == want["digest"]
    facts = {"killed": killed, "while saving": inside, "runs": begun + 1, "grown": want["grown"]}
    return {"back": back, "failed": failed, "equal": equal, **facts}


def comes_back(folder: Path, times: int) -> dict[str, float]:
    """Start a large run again and again; return the worst figures."""
    worst: dict[str, float] = {}
    for number in range(times + 1):
        with start(folder / "wide", WIDE, 3 * (number + 1)) as process:
            first, last = read(process), read(process)
        if number:  # the first one has nothing to come back from
            facts = {"seconds to step": first["back"] - first["imported"], **last["figures"]}
            worst = {name: max(value, worst.get(name, 0.0)) for name, value in facts.items()}
    return worst


def child(folder: Path, wide: int, until: int, born: float) -> int:
    """Train from wherever the newest checkpoint is; in another process than the bench."""
    import torch
    import torch._dynamo  # torch's first optimizer imports it: half of torch's own start
    from torch import nn

    imported = time.monotonic() - born

    import esper
    from esper.tolaria.checkpoint import Batches, CheckpointManager, Run

    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(CLASSES, 1), nn.Tanh(), nn.Dropout(0.1), nn.Linear(1, CLASSES)]
    if wide:
        layers += [nn.Linear(CLASSES, wide), nn.Linear(wide, wide), nn.Linear(wide, CLASSES)]
    net = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02 if not wide else 1e-4)
    labels = torch.arange(640) % CLASSES
    data = torch.utils.data.TensorDataset(
        2 * torch.eye(CLASSES)[labels] + 0.3 * torch.randn(640, CLASSES), labels
    )
    batches = Batches(torch.utils.data.DataLoader(data, BATCH, shuffle=True))

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    probe = [(2 * torch.eye(CLASSES).repeat(16, 1), torch.arange(CLASSES).repeat(16))]
    budget = {"parameters": 1.5 if wide else 8.0}
    growth = esper.grow(net, optimizer, loss_fn, probe=probe, steps=EPOCHS * 20, budget=budget, sites=["0>3"])
    manager = CheckpointManager(
        folder, Run(net, optimizer, growth=growth, batches=batches), every=None if wide else 3
    )
    manager.resume()
    pace: list[float] = []
    while batches.epoch < EPOCHS and not (until and manager.steps >= until):
        for batch in batches:
            begun = time.perf_counter()
            loss = loss_fn(net, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            growth.step(batch, loss)
            pace.append(time.perf_counter() - begun)
            manager.step()
            if len(pace) == 1:
                back = time.monotonic() - born
                print(json.dumps({"back": back, "imported": imported, "step": manager.steps}), flush=True)
            if until and manager.steps >= until:
                break
    if wide:
        for _ in range(3):
            manager.save(wait=True)
    manager.close()
    figures = {}
    if wide:
        stall, cost = float(np.median(list(manager.stalls))), manager.cadence.cost
        share = cost / manager.cadence.interval
        figures = {"stall in steps": stall / float(np.median(pace)), "share": share, "cost in seconds": cost}
    if not until:
        growth.finish()
    sha = hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in net.state_dict().values()))
    print(json.dumps({"digest": sha.hexdigest(), "figures": figures, "grown": len(growth.plans)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
