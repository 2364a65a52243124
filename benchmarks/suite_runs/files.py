"""One file per part of the suite, so that parts run on their own, on other days, and are joined."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import esper
from benchmarks import machine
from benchmarks.flops import parameters
from benchmarks.intervals import mean_of
from benchmarks.suite_runs.arms import Part
from benchmarks.suite_runs.training import Run
from benchmarks.suite_tasks import TASKS, SuiteTask

FOLDER = "suite"
OMITTED = (
    "grew",
    "curve",
)  # of a run: a curve is kept as the mean over seeds, growth as what changed the shape
SHAPES = ("widened", "grafted", "deepened")


@dataclass(frozen=True)
class Record:
    """A part as read back."""

    task: SuiteTask
    schedule: str
    seeds: list[int]
    quick: bool
    rates: Mapping[str, float]
    runs: Mapping[str, list[Run]]
    curves: Mapping[str, Mapping[str, list[float]]]
    machine: Mapping[str, Any]

    @property
    def ladder(self) -> dict[str, list[Run]]:
        """The runs of every size from small to full."""
        between = [f"ladder-{k}" for k in range(1, len(self.task.sizes) - 1)]
        return {arm: self.runs[arm] for arm in ("small", *between, "full") if arm in self.runs}


def write(part: Part, folder: Path, jobs: int) -> Path:
    """Write a part; a part of the same task and schedule is replaced."""
    task = part.task
    limit = parameters(task.build(task.full, 0))
    record = {
        "bench": "suite",
        "task": task.name,
        "selection": task.selection,
        "schedule": part.schedule,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.facts(jobs),
        "seeds": list(part.seeds),
        "quick": part.quick,
        "settings": {"budget": {"parameters": limit}, "config": esper.load_config().model_dump(mode="json")},
        "training": {
            "steps": part.steps,
            "batch": task.batch,
            "rates": task.rates,
            "metric": task.metric,
            "sizes": task.sizes,
        },
        "rates": part.rates,
        "selection_runs": {
            arm: [brief(run) for runs in by_rate.values() for run in runs]
            for arm, by_rate in part.grid.items()
        },
        "runs": {arm: [brief(run) for run in runs] for arm, runs in part.runs.items()},
        "curves": {arm: curve(runs) for arm, runs in part.runs.items() if runs[0].curve},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task.name}-{part.schedule}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def brief(run: Run) -> dict[str, Any]:
    """Keep of a run its figures and, of what growth told, the changes of shape."""
    figures = {name: value for name, value in run.to_dict().items() if name not in OMITTED}
    grew = [{key: told.get(key) for key in ("kind", "step", "site", "units")} for told in run.grew]
    return figures | {"grew": [told for told in grew if told["kind"] in SHAPES]}


def curve(runs: Sequence[Run]) -> dict[str, list[float]]:
    """Average the seeds' curves point by point."""
    moments = list(zip(*(run.curve for run in runs if run.curve), strict=True))
    columns = [[mean_of([point[k] for point in moment]).mean for moment in moments] for k in range(3)]
    return dict(zip(("flops", "parameters", "test"), columns, strict=True))


def read(folder: Path) -> list[Record]:
    """Read every part there is, in the order of the tasks."""
    found = []
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["task"] not in TASKS:
            raise ValueError(f"{path} is of a task {data['task']!r} that is no longer here; remove the file")
        found.append(
            Record(
                task=TASKS[data["task"]],
                schedule=data["schedule"],
                seeds=data["seeds"],
                quick=data["quick"],
                rates=data["rates"],
                runs={arm: [revive(run) for run in runs] for arm, runs in data["runs"].items()},
                curves=data["curves"],
                machine=data["machine"],
            )
        )
    order = list(TASKS)
    return sorted(
        found, key=lambda record: (record.task.selection, order.index(record.task.name), record.schedule)
    )


def revive(data: Mapping[str, Any]) -> Run:
    """Rebuild a run from JSON, in which tuples became lists."""
    return Run(**{**data, "size": tuples(data["size"]), "grew": tuple(data["grew"])})


def tuples(value: Any) -> Any:
    return tuple(tuples(item) for item in value) if isinstance(value, list) else value
