"""What befell a run and did not end it, in words: kills, alarms, rollbacks, lost processes."""

from __future__ import annotations

from dataclasses import dataclass

from esper.contracts import Event
from esper.nissa.run.facts import ReopenedFacts
from esper.nissa.run.history import RunHistory
from esper.nissa.run.records import Resume
from esper.nissa.wording import count, short


@dataclass(frozen=True, slots=True)
class Note:
    """One thing that befell a run."""

    step: int
    kind: str  # "resumed", "alarm", "rolled back", "taken back", "processes", "wrapped again"
    text: str
    to: int | None = None  # the step a rollback led to, or an event that was taken back


def notes(history: RunHistory) -> list[Note]:
    """List what a run survived, in order of steps."""
    found = [Note(one.step, "resumed", went_on(one)) for one in history.resumes]
    found += [Note(one.step, "alarm", str(one.data["message"])) for one in history.alarms]
    found += [
        Note(one.step, "rolled back", str(one.data["message"]), int(one.data["to"]))
        for one in history.rollbacks
    ]
    found += [Note(one.step, "taken back", took_back(one), int(one.data["to"])) for one in history.taken_back]
    found += [Note(one.step, "processes", of_ranks(one)) for one in history.ranks]
    found += [Note(one.step, "wrapped again", rewrapped(one)) for one in history.rewraps]
    return sorted(found, key=lambda note: note.step)


def went_on(resume: Resume) -> str:
    """Say where a process went on from, and what it does again."""
    where = resume.name or f"step {resume.step:,}"
    if not resume.redone:
        return f"went on from {where}"
    many = "step is" if resume.redone == 1 else "steps are"
    return f"went on from {where}; at least {resume.redone:,} {many} done again"


def took_back(event: Event) -> str:
    """Say which growth did not pay, and what it cost."""
    data = event.data
    return (
        f"what grew at step {data['to']:,} did not pay: held-out loss {short(data['before'])} → "
        f"{short(data['now'])}; {data['lost']:,} steps were lost"
    )


def reopened(data: ReopenedFacts) -> str:
    """Say how a saturated host was re-opened."""
    ways = {"output": "its output layer was tempered", "shrink": "all its weights were shrunk"}
    found = f"the host was re-opened: {ways.get(data['how'], data['how'])}"
    return found if data["loss"] is None else f"{found} at training loss {short(data['loss'])}"


def of_ranks(event: Event) -> str:
    """Say what happened to which process."""
    rank, world = event.data["rank"], event.data["world"]
    who = "all processes" if rank is None else f"rank {rank}"
    return f"{who}: {event.data['why']}; {world} {'is' if world == 1 else 'are'} running"


def rewrapped(event: Event) -> str:
    """Say what grew into the layers of a model that trains in many processes, and what that took."""
    return f"{short(event.data['sites'])} is in the layers now; {short(event.data['milliseconds'], 3)} ms"


def of_checkpoints(history: RunHistory) -> str | None:
    """Say in a line what the run's checkpoints cost; None where it kept none."""
    if not history.checkpoints:
        return None
    last = history.checkpoints[-1].data
    stalls = [float(one.data["seconds"]) for one in history.checkpoints if one.data["seconds"] is not None]
    line = f"{len(history.checkpoints):,} checkpoint{'s' if len(history.checkpoints) > 1 else ''}, "
    line += f"the last at step {last['step']:,} ({count(last['bytes'])}B)"
    return line + (f"; training stood still for {short(1000 * sum(stalls), 3)} ms in all" if stalls else "")
