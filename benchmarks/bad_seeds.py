"""Is any of a hundred bad seeds kept, and is the host bit for bit what it was before it?"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import compare, harness
from benchmarks.bad_kernels import KINDS, Victim
from benchmarks.bad_runs import HOSTS, STEPS, Run
from benchmarks.promises import Promise
from benchmarks.workers import workers
from esper.errors import LossError
from esper.kasmina.race.gate import Verdict
from esper.kasmina.race.trial import Exposed, Judged, Trial

NAME = "bad-seeds"
EACH = 20
SURE = 3.0  # standard errors on examples neither the seed nor the governor has seen
TRIES = 20  # runs until one exposes a seed, and until one that is to do harm does


@dataclass(frozen=True)
class Job:
    """A bad seed."""

    kind: str
    number: int
    governed: bool = True


@dataclass(frozen=True)
class Answer:
    """What became of it."""

    kind: str
    how: str
    host: str
    governed: bool
    injected: bool  # False: no seed came so far in any try
    kept: bool
    stopped: str
    reason: str
    steps: int | None
    rollbacks: int
    exact: int  # of them
    untouched: bool | None  # host as it would be without any growth; None where it felt an exposed seed
    gain: float | None  # held-out, on against off, when last looked at
    total: float | None  # held-out, against before exposure
    doubt: float | None = None  # its standard error


def run(job: Job) -> Answer:
    """Let a seed come, make it bad, and follow it until it is gone or kept."""
    ways = KINDS[job.kind]
    how = list(ways)[job.number % len(ways)]
    where = ways[how][0]
    names, few = list(HOSTS), job.kind.startswith("harmful")
    first = job.number // len(ways) + job.number
    for attempt in range(TRIES):
        # Momentum makes a host lean on a seed; the others hardly do so in 30 steps.
        name = "cnn" if how.startswith("ransom") else names[(first + attempt) % len(names)]
        seed = 1000 * attempt + job.number
        one = Run(HOSTS[name], seed, job.governed, few)
        if not one.until(where):
            continue
        answer = follow(one, job, how, name, seed, few)
        if not few or (answer.total is not None and answer.total < -SURE * (answer.doubt or 0.0)):
            return answer  # one that was meant to harm and did not, beyond chance, was no bad seed
    return Answer(job.kind, how, "", job.governed, False, False, "", "", None, 0, 0, None, None, None)


UNJUDGED = Verdict(False, 0, 0.0, 0.0, None, None, 0, "not judged yet")


def alive(one: Run, trial: Trial) -> bool:
    """Tell whether a trial is still under way."""
    return one.trial is not None and one.trial.origin is trial.origin


def follow(one: Run, job: Job, how: str, name: str, seed: int, few: bool) -> Answer:
    """Turn the seed that is awake and see what becomes of it."""
    where, turn = KINDS[job.kind][how]
    trial, begun = one.trial, one.growth.steps
    draw = random.Random(f"{job.kind} {job.number}")
    victim = Victim(trial, one.net, one, draw)
    before = one.held_out(None) if isinstance(trial, Exposed) else None
    if where == "winner":
        hand_over = trial.race.kernel

        def spoilt(*args: Any) -> Any:
            trial.race.kernel = hand_over
            won = hand_over(*args)
            victim.trial = Judged(trial.origin, trial.started, trial.tap, won, UNJUDGED)
            turn(victim)
            victim.trial = trial
            return won

        trial.race.kernel = spoilt
    else:
        turn(victim)
    gain = total = doubt = None
    reason, why = "", ""
    last = begun + 2 * one.growth.run.orchestrator.timing.ramp if where == "finish" else STEPS
    try:
        while alive(one, trial) and one.growth.steps < last:
            victim.trial = one.trial
            victim.step()
            if before is not None:
                now = one.held_out(trial.origin.layer.kernel)
                gain = float((one.held_out(None) - now).mean())
                total, doubt = float((before - now).mean()), float((before - now).std()) / len(now) ** 0.5
            one.step()
        if alive(one, trial):
            one.growth.finish()
    except LossError as error:
        reason = why = f"the run ended: {error}"
    decision = trial.origin.decision.id
    outcomes = [e for e in one.events if e.kind == "outcome" and e.data["decision"] == decision]
    kept = any(e.data["kept"] for e in outcomes)
    if outcomes and not why:
        reason = outcomes[-1].data["reason"]
    ended = outcomes[-1].step if outcomes else one.growth.steps
    exact, clean = check(one, where, name, seed, few)
    return Answer(
        job.kind,
        how,
        name,
        job.governed,
        True,
        kept,
        "kept" if kept else stopped(reason),
        reason,
        ended - begun,
        len(one.restored),
        exact,
        clean,
        gain,
        total,
        doubt,
    )


def check(one: Run, where: str, name: str, seed: int, few: bool) -> tuple[int, bool | None]:
    """Compare with a twin that never grew: every rollback, and a host that no seed was exposed to."""
    grown = any(e.kind in ("widened", "grafted") for e in one.events)
    exposed = any(e.kind == "stage" and e.data["target"] == "GRAFTING" for e in one.events)
    wanted = {to for to, _ in one.restored} | (
        {one.growth.steps} if not (grown or exposed or one.restored) else set()
    )
    if not wanted:
        return 0, None
    twin = Run(HOSTS[name], seed, False, few, grows=False)
    while twin.growth.steps < max(wanted):
        twin.step()
        twin.digests[twin.growth.steps] = twin.digest()
    exact = sum(twin.digests[to] == digest for to, digest in one.restored)
    clean = None if grown or exposed or one.restored else one.digest() == twin.digest()
    return exact, clean


WORDS = {
    "doing nothing won": "race",
    "the run ended:": "stop",
    "leak:": "governor: leak",
    "harm:": "governor: harm",
    "spike:": "governor: spike",
    "nonfinite:": "governor: not finite",
    "divergence:": "governor: divergence",
    "dead:": "governor: dead",
    "it failed": "governor: faults",
    "three faults": "fault counter",
    "the loss is worse": "evaluation",
    "put back": "materialisation check",
    "the run ended": "last gate",
}


def stopped(reason: str) -> str:
    """Say what stopped a seed, by the reason it was given."""
    return next((name for words, name in WORDS.items() if words in reason), "gate")


def main(argv: Sequence[str]) -> int:
    """Turn seeds bad in every way, with a governor and without; count what is kept."""
    chosen = harness.options(NAME, __doc__, argv, seeds=EACH)
    jobs = [
        Job(kind, number, governed)
        for governed in (True, False)
        for kind in KINDS
        for number in range(chosen.seeds)
    ]
    with workers(chosen.jobs) as pool:
        answers = pool.map(run, jobs, "bad seeds")
    shown = [table([a for a in answers if a.governed]), ways_table(answers)]
    figures = {"runs": [vars(answer) for answer in answers]}
    return harness.conclude(NAME, chosen, shown, promises([a for a in answers if a.governed]), figures)


def promises(answers: Sequence[Answer]) -> list[Promise]:
    """Judge what was kept and how exact the ways back were."""
    injected = [a for a in answers if a.injected]
    back, exact = sum(a.rollbacks for a in injected), sum(a.exact for a in injected)
    clean = [a.untouched for a in injected if a.untouched is not None]
    return [
        Promise("bad seeds injected", len(injected), ">=", 5 * EACH, digits=0),
        Promise("kept", sum(a.kept for a in injected), "<=", 0, digits=0),
        Promise("rollbacks that are bit for bit", exact / back if back else None, ">=", 1.0),
        Promise(
            "hosts that no seed was exposed to, as without it",
            sum(clean) / len(clean) if clean else None,
            ">=",
            1.0,
        ),
    ]


def table(answers: Sequence[Answer]) -> Any:
    shown = compare.titled(
        "Bad seeds",
        [
            "kind",
            "injected",
            "kept",
            "stopped by",
            "median steps",
            "rolled back",
            "bit for bit",
            "worse to remove",
        ],
    )
    for kind in KINDS:
        mine = [a for a in answers if a.kind == kind and a.injected]
        by = {name: sum(a.stopped == name for a in mine) for name in dict.fromkeys(a.stopped for a in mine)}
        steps = [a.steps for a in mine if a.steps is not None]
        shown.add_row(
            kind,
            str(len(mine)),
            str(sum(a.kept for a in mine)),
            ", ".join(f"{name} {count}" for name, count in by.items()),
            f"{statistics.median(steps):.0f}" if steps else "–",
            str(sum(a.rollbacks for a in mine)),
            str(sum(a.exact for a in mine)),
            str(sum((a.gain or 0.0) > 0.0 > (a.total or 0.0) for a in mine)),
        )
    return shown


def ways_table(answers: Sequence[Answer]) -> Any:
    shown = compare.titled("Kept, of those injected", ["kind", "way", "governed", "without a governor"])
    for kind, ways in KINDS.items():
        for how in ways:
            mine = [a for a in answers if (a.kind, a.how) == (kind, how) and a.injected]
            both = [[a for a in mine if a.governed is governed] for governed in (True, False)]
            shown.add_row(kind, how, *(f"{sum(a.kept for a in part)} of {len(part)}" for part in both))
    return shown


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
