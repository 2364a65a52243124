"""What the process of a rehearsal is told, and what it writes down: plain JSON, readable after any death."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from esper.chaos.clock import real


class Mark(TypedDict):
    """One line that a process wrote down."""

    at: float  # seconds on the clock that does not jump
    attempt: int
    kind: str  # "begun", "resumed", "step", "event", "fault", "damage", "error", "finished"
    step: int
    what: NotRequired[str]  # of a fault, or of damage
    nth: NotRequired[int]  # call that failed, and what it was asked
    verb: NotRequired[str]
    event: NotRequired[str]  # its kind
    data: NotRequired[Mapping[str, Any]]  # an event's plain facts, as Event says for its kind
    written: NotRequired[int]  # checkpoints, at the end
    failures: NotRequired[int]


@dataclass(frozen=True)
class Spec:
    """One process of a run.

    Attributes:
        maker: ``module:callable`` that makes the trainer; called with ``config``, ``run_dir`` and, by name,
            ``epochs``, ``growth``, ``every``, ``wrap`` and ``on_event``.
        config: Path of the config that says what the run trains.
        run_dir: Path of the run's folder; the process is given nothing else to go on from.
        marks: Path of the file in which it writes down what it does, outside the run's folder.
        weights: Path of the file for the weights it ends with.
        fault: Name in ``faults/``; None for the run nobody disturbs.
        seed: Seed of what a fault draws.
        at: Optimizer step of the fault.
        every: Optimizer steps between checkpoints; None: from their measured cost.
        attempt: 0, then 1 after the first death, and so on.
        namespace: Process whose disk this one joins.
        epochs: Number of epochs, instead of the config's.
        ranks: Processes that train together.
        relaunches: Times their launcher starts all of them again.
        growth: Settings of growth over the config's.
    """

    maker: str
    config: str
    run_dir: str
    marks: str
    weights: str
    fault: str | None = None
    seed: int = 0
    at: int = 0
    every: int | None = None
    attempt: int = 0
    namespace: int | None = None
    epochs: int | None = None
    ranks: int = 1
    relaunches: int = 0
    growth: Mapping[str, object] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write it to a file."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Spec:
        """Read it from a file."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


class Marks:
    """Appends marks to a file: one ``write`` each, so that a kill loses none that were made."""

    def __init__(self, path: str | Path, attempt: int, rank: int = 0) -> None:
        self.handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.attempt, self.rank = attempt, rank

    def __call__(self, kind: str, step: int, **facts: object) -> None:
        """Write one down, with the time on the clock that does not jump; of other ranks only the fault."""
        if self.rank and kind != "fault":
            return
        mark = {"at": real(), "attempt": self.attempt, "kind": kind, "step": step, **facts}
        os.write(self.handle, json.dumps(mark).encode() + b"\n")


def read_marks(path: Path) -> list[Mark]:
    """Read marks, oldest first; those of a process that never came so far are none."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
