"""What a damaged journal still tells: its whole lines, where only the last ones are spoiled."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from esper.contracts import Event
from esper.errors import EsperError, RunError
from esper.printable import quoted, shortened

MOST_JOURNAL = 1 << 30  # bytes
MOST_SAID = 300  # characters of an error that a damaged event led to


def is_object(line: bytes) -> bool:
    """Tell a line that holds a JSON object from a damaged one: no prefix of an object is JSON."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def spoiled(lines: Sequence[bytes]) -> int:
    """Count the damaged lines at the end; 0 where none is whole, for then nothing tells what they were."""
    for count, line in enumerate(reversed(lines)):
        if is_object(line):
            return count
    return 0


def left_out(path: Path, cut: bytes, last: Event | None) -> Event:
    """Tell of what was cut off the end of a journal, as an event."""
    count = len(cut.splitlines())
    if count > 1:
        message = f"the last {count} lines of {path} are damaged ({len(cut)} bytes) and left out"
    else:
        message = (
            f"the last line of {path} was torn ({len(cut)} bytes) and left out: the run was killed writing it"
        )
    return Event("warning", last.step if last else 0, {"message": message})


@contextmanager
def fitting(run_dir: str | Path) -> Iterator[None]:
    """Turn what odd values in a run's events lead to, wherever they are read, into one error.

    Raises:
        RunError: They do not fit together.
    """
    try:
        yield
    except EsperError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise RunError(
            f"the events in {run_dir} do not fit together ({type(error).__name__}: "
            f"{shortened(str(error), MOST_SAID)}); restore the file from a copy"
        ) from error


def require_types(kind: object, step: object, time: object, data: object, where: str) -> None:
    """Refuse an event whose parts are not what they must be.

    Args:
        kind: Name of the event's kind.
        step: Optimizer step, 0 or more.
        time: Seconds since the epoch.
        data: Mapping of the event's fields.
        where: Name of the line, for messages.

    Raises:
        RunError: With the part.
    """
    wrong = {
        "kind": not isinstance(kind, str),
        "step": isinstance(step, bool) or not isinstance(step, int) or step < 0,
        "time": isinstance(time, bool) or not isinstance(time, int | float),
        "data": not isinstance(data, dict),
    }
    given = {"kind": kind, "step": step, "time": time, "data": data}
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise RunError(
                f"{where} is not a whole event: its {name} is {quoted(given[name])}; restore the file from "
                "a copy"
            )
