"""The tasks of ``esper bench suite``: one file per source of data, a tuple ``TASKS`` in each.

Selection tasks are those on which Esper's defaults were chosen; no conclusion is drawn on them.
"""

from __future__ import annotations

from benchmarks.suite_tasks import digits, glyphs, series, tables, teachers, transformers
from benchmarks.suite_tasks.task import SCHEDULES, Batch, Schedule, Size, SuiteTask

__all__ = ["SCHEDULES", "TASKS", "Batch", "Schedule", "Size", "SuiteTask"]

TASKS: dict[str, SuiteTask] = {
    task.name: task
    for file in (digits, tables, transformers, teachers, glyphs, series)
    for task in file.TASKS
}
