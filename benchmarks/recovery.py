"""Does a killed run come back by itself, with the same bits, and how fast: 100 kills, 10 M parameters?"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import compare, harness
from benchmarks.lives import COMMITS, MODULE, MOMENTS, READING, Life
from benchmarks.promises import Promise

NAME = "recovery"
KILLS, ROUNDS = 100, 10  # of a run of 600 steps
LEAST = 5  # kills in every moment
OFTEN = tuple(moment for moment in MOMENTS if moment not in COMMITS.values())  # in every life
SAME = 3  # kills in one and the same commit at most; then it may pass
STARTING, AIMED = 0.1, 0.5  # shares of the lives that are killed as they start, or at a moment by name
CLASSES, BATCH = 8, 32
WIDE = 3160  # a square layer of 10 M parameters


def main(argv: Sequence[str]) -> int:
    """Kill one growing run again and again, compare all its bits; then time a large one's way back.

    A kill falls at a random instant: while the process starts, anywhere in a step, or, with aim, inside the
    moments where a kill could do harm. The run says when it enters and leaves each; one that was entered and
    never left is where it died.
    """
    if argv[:1] == ["--child"]:
        return child(Path(argv[1]), int(argv[2]), float(argv[3]))
    chosen = harness.options(NAME, __doc__, argv, seeds=1)
    kills, rounds, least = (KILLS // 10, 1, 1) if chosen.quick else (KILLS, ROUNDS, LEAST)
    folder = Path(tempfile.mkdtemp(prefix="esper-recovery-"))
    try:
        small = Killing(folder, kills, rounds, least).survive()
        large = comes_back(folder, 1 if chosen.quick else 5)
    finally:
        shutil.rmtree(folder)
    table = compare.titled(
        f"{small['killed']} kills of one run of {rounds * 60} steps that grows",
        ["killed while (it may do two things at once)", "kills"],
    )
    for moment in (*MOMENTS, "between them", "starting"):
        table.add_row(moment, str(small["died"].get(moment, 0)))
    table.add_row("a seed was awake", str(small["awake"]))
    back = compare.titled("The way back", ["", "p50", "p99"])
    for name in ("seconds to the first step", "steps done twice"):
        back.add_row(name, *(f"{np.percentile(small[name], p):.2f}" for p in (50, 99)))
    wide = compare.titled("10 M parameters with Adam, 120 MB", ["", "worst"])
    for name, value in large.items():
        wide.add_row(name, f"{value:.3f}")
    judged = [
        Promise("kills after which the run came back by itself", 1.0 - small["failed"] / kills, ">=", 1.0),
        Promise(
            "kills inside a moment, least of all moments",
            min(small["died"].get(m, 0) for m in MOMENTS),
            ">=",
            least,
            digits=0,
        ),
        Promise("everything equal at the end, bit for bit", float(small["equal"]), ">=", 1.0, digits=0),
        Promise(
            "10 M parameters: s to the first step beyond importing torch", large["seconds to step"], "<=", 5.0
        ),
        Promise("10 M parameters: share of the run checkpoints take", large["share"], "<=", 0.015),
        Promise("10 M parameters: stall in steps", large["stall in steps"], "<=", 1.0),
    ]
    return harness.conclude(NAME, chosen, [table, back, wide], judged, {"small": small, "large": large})


@dataclass
class Killing:
    """Kills one run again and again.

    Args:
        folder: Of its checkpoints.
        kills: How many.
        rounds: The run's length.
        least: Kills in every moment.
    """

    folder: Path
    kills: int
    rounds: int
    least: int
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    died: Counter[str] = field(default_factory=Counter)  # where
    commits: Counter[tuple[str, int]] = field(default_factory=Counter)  # kills in each, by kind and step
    reached: int = 0  # the last step any life did
    runs: int = 0  # that ended before the last kill; another one is begun then
    killed: int = 0

    def survive(self) -> dict[str, Any]:
        """Compare the end with that of a run that nobody killed."""
        whole = self.life("whole")
        whole.end()
        want, first, self.lengths = whole.said("end"), whole.said("back"), whole.lengths()
        assert want is not None, "the run that nobody killed did not end"
        assert first is not None
        self.start = first["back"]
        back, twice, failed, awake = [self.start], [], 0, 0
        while not failed and self.killed < self.kills * (2 if self.missing(MOMENTS) else 1):
            life = self.life(f"cut{self.runs}")
            self.strike(life)
            came = life.said("back")
            if came is not None:
                back.append(came["back"])
                twice.append(max(self.reached - came["from"], 0))
            awake += self.note(life)
            if life.process.returncode == 0:  # faster than its killer
                found = life.said("end")
                failed += found is None or found["digest"] != want["digest"]
                self.runs, self.reached = self.runs + 1, 0
            failed += life.process.returncode not in (0, -9)
        last = self.life(f"cut{self.runs}")
        last.end()
        found = last.said("end")
        equal = not failed and found is not None and found["digest"] == want["digest"]
        facts = {
            "killed": self.killed,
            "failed": failed,
            "runs": self.runs + 1,
            "awake": awake,
            "equal": equal,
        }
        times = {"seconds to the first step": back, "steps done twice": twice, "seconds inside": self.lengths}
        return {**facts, **times, "died": dict(self.died), "grown": want["plans"]}

    def life(self, name: str) -> Life:
        return Life(["-m", MODULE, str(self.folder / name), str(self.rounds)])

    def strike(self, life: Life) -> None:
        """Wait for the chosen instant, and kill."""
        if self.draw.random() < STARTING:
            time.sleep(self.draw.uniform(0.0, self.start))
            self.killed += life.kill()
            return
        missing, left = self.missing(), max(self.kills - self.killed, 1)
        patient = sum(self.least - self.died[m] for m in self.missing(COMMITS.values())) >= left
        aimed = self.draw.random() < AIMED or 2 * len(missing) >= left
        aim = self.draw.choice(missing) if missing and aimed else None
        limit = self.reached + self.draw.uniform(1, 2 * (self.rounds * 60 - self.reached) / (left + 1))

        def now(line: str) -> bool:
            word, _, what = line.partition(" ")
            if word == "step":
                return aim is None and not patient and int(what.split()[0]) >= limit
            return word == "in" and (what == aim or (what in COMMITS.values() and self.open(what, life)))

        line = life.wait(now)
        if line is not None:
            moment = line.partition(" ")[2] if line.startswith("in") else "step"
            time.sleep(self.draw.uniform(0.0, self.lengths.get(moment, 0.0)))
        self.killed += life.kill()

    def missing(self, moments: Iterable[str] = OFTEN) -> list[str]:
        """Name the moments that too few kills fell into so far."""
        return [moment for moment in moments if self.died[moment] < self.least]

    def open(self, commit: str, life: Life) -> bool:
        """Tell whether a commit should be killed in once more."""
        return self.died[commit] < self.least and self.commits[commit, life.steps()[0]] < SAME

    def note(self, life: Life) -> bool:
        """Note where a life ended; tell whether a seed was awake by then."""
        step, stages = life.steps()
        self.reached = max(self.reached, step)
        if READING in (lengths := life.lengths()):  # the run that nobody killed had nothing to read
            self.lengths[READING] = lengths[READING]
        if life.process.returncode == 0:
            return False
        inside = life.inside()
        for moment in inside:
            self.died[moment] += 1
            self.commits[moment, step] += 1
        if not inside:
            self.died["between them" if life.said("back") else "starting"] += 1
        return bool(set(stages.split("+")) - {"", "DORMANT", "EMBARGOED"})


def comes_back(folder: Path, times: int) -> dict[str, float]:
    """Start a large run again and again; return the worst figures."""
    worst: dict[str, float] = {}
    for number in range(times + 1):
        life = Life(["-m", "benchmarks.recovery", "--child", str(folder / "wide"), str(3 * (number + 1))])
        life.end()
        first, last = life.said("back"), life.said("end")
        assert first is not None, "the large run did not come back"
        assert last is not None, "the large run did not end"
        if number:  # the first one has nothing to come back from
            facts = {"seconds to step": first["back"] - first["imported"], **last["figures"]}
            worst = {name: max(value, worst.get(name, 0.0)) for name, value in facts.items()}
    return worst


def child(folder: Path, until: int, born: float) -> int:
    """Train a large model from wherever the newest checkpoint is up to a step; in a process of its own."""
    import torch
    import torch._dynamo  # torch's first optimizer imports it: half of torch's own start
    from torch import nn

    imported = time.monotonic() - born

    import esper
    from esper.checkpoint import Batches, CheckpointManager, Run

    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Linear(CLASSES, 1), nn.Tanh(), nn.Dropout(0.1), nn.Linear(1, CLASSES)),
        *(nn.Linear(CLASSES, WIDE), nn.Linear(WIDE, WIDE), nn.Linear(WIDE, CLASSES)),
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
    labels = torch.arange(20 * BATCH) % CLASSES
    data = torch.utils.data.TensorDataset(torch.randn(len(labels), CLASSES), labels)
    batches = Batches(torch.utils.data.DataLoader(data, BATCH, shuffle=True))

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    growth = esper.grow(
        net,
        optimizer,
        loss_fn,
        probe=[data[:BATCH]],
        steps=200,
        budget={"growth_factor": 1.5},
        growth="incubate",
        sites=["0>3"],
    )
    manager = CheckpointManager(folder, Run(net, optimizer, growth=growth, batches=batches))
    manager.resume()
    pace: list[float] = []
    while manager.steps < until:
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
                facts = {"back": time.monotonic() - born, "imported": imported, "step": manager.steps}
                print(f"back {json.dumps(facts)}", flush=True)
            if manager.steps >= until:
                break
    for _ in range(3):
        manager.save(wait=True)
    manager.close()
    stall, cost = float(np.median(list(manager.stalls))), manager.cadence.cost
    figures = {
        "stall in steps": stall / float(np.median(pace)),
        "share": cost / manager.cadence.interval,
        "cost in seconds": cost,
    }
    print(f"end {json.dumps({'figures': figures})}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
