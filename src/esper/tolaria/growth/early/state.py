"""What growing early knows of itself: what is due, asked, kept and still judged."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NotRequired, TypedDict

from esper.kasmina.evidence.significance import Spending
from esper.tolaria.growth.early.hindsight import Hindsight
from esper.tolaria.growth.early.insertion import Insertion
from esper.tolaria.growth.early.judged import Judged, JudgedState
from esper.tolaria.growth.early.reach import Reach
from esper.tolaria.growth.early.seeds import Seeds
from esper.tolaria.growth.early.takeback import Before
from esper.tolaria.growth.early.timetable import Timetable, TimetableState
from esper.tolaria.growth.evidence.evidence import Evidence, EvidenceState
from esper.tolaria.growth.evidence.streamed import Streamed
from esper.tolaria.growth.run.account import EventRecord, Point, record_from
from esper.tolaria.growth.run.allowance import Allowance
from esper.tolaria.growth.run.mishaps import Mishaps
from esper.tolaria.growth.run.proven import Proven
from esper.tolaria.growth.run.state import RunState


@dataclass
class Asking:
    """An event whose look is under way.

    Attributes:
        record: What is told of it.
        free: Names of the places that could grow.
        units: To test, by name.
        before: The run as it was, where that was kept a step before the insertion.
    """

    record: EventRecord
    free: list[str]
    units: dict[str, int]
    before: Before | None = None


class RecipeState(TypedDict):
    """The early recipe as a checkpoint keeps it."""

    timetable: TimetableState
    evidence: EvidenceState
    spending: Any  # what ``Spending`` writes and reads
    waiting: str | None
    barred: NotRequired[dict[str, str]]
    records: list[dict[str, Any]]  # the fields of each
    points: list[dict[str, Any]]
    asking: NotRequired[list[Any] | None]  # place of its record, free, units, before
    open: JudgedState | None


class EarlyRun:
    """The parts and the state of the early recipe.

    Args:
        run: What the run knows of itself.
        proven: What the model was like when its places were proven.

    Attributes:
        open: The event that is still judged.
        asking: The event whose look is under way.
        waiting: Why an event waits for ``growth.rewrap()``.
        doubts: What would keep anything from passing.
    """

    def __init__(self, run: RunState, proven: Proven) -> None:
        self.run, self.parts = run, run.parts
        self.settings = run.config.early
        self.insertion = Insertion(self.parts.committer, self.parts.streams.draw, run.mishaps.say)
        self.evidence = Streamed(run) if self.parts.example is not None else Evidence(run)
        self.doubts = self.evidence.doubts()
        self.timetable = Timetable(run, self.evidence)
        self.reach = Reach(run, self.timetable, proven)
        self.mishaps: Mishaps = run.mishaps
        self.hindsight = Hindsight(run, self.evidence, self.insertion)
        self.seeds = Seeds(run)
        self.allowance = Allowance(run)
        self.spending = Spending(self.settings.false_keep, self.settings.further)
        self.open: Judged | None = None
        self.asking: Asking | None = None
        self.waiting: str | None = None
        self.records, self.points = list[EventRecord](), list[Point]()

    def note_point(self, held_out: float | None) -> None:
        """Write a point of the curve."""
        self.points.append(self.run.point(held_out))

    def state_dict(self) -> RecipeState:
        """Return what a run needs to go on, as tensors, numbers, strings and containers of them."""
        records, asking = self.records, self.asking
        before = None if asking is None or asking.before is None else asking.before.state_dict()
        return {
            "timetable": self.timetable.state_dict(),
            "evidence": self.evidence.state_dict(),
            "spending": self.spending.state_dict(),
            "waiting": self.waiting,
            "barred": dict(self.reach.barred),
            "records": [asdict(record) for record in records],
            "points": [asdict(point) for point in self.points],
            "asking": None
            if asking is None
            else [records.index(asking.record), asking.free, asking.units, before],
            "open": None if self.open is None else self.open.state_dict(records),
        }

    def load_state_dict(self, state: RecipeState) -> None:
        """Go on."""
        self.timetable.load_state_dict(state["timetable"])
        self.evidence.load_state_dict(state["evidence"])
        self.spending.load_state_dict(state["spending"])
        self.waiting = state["waiting"]
        self.reach.barred.update(state.get("barred", {}))
        self.records = [record_from(record) for record in state["records"]]
        self.points = [Point(**point) for point in state["points"]]
        if state.get("asking") is not None:
            index, free, units, before = state["asking"]
            kept = None if before is None else Before.from_state(before)
            self.asking = Asking(self.records[index], list(free), dict(units), kept)
        self.open = None if state["open"] is None else Judged.from_state(state["open"], self.records)
