"""Presses Ctrl-C at lines of Esper's inside one call, in a child each that then trains on and ends."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

import esper
from tests.attacks.staged import Loop, in_a_child

HOME = str(Path(esper.__file__).parent)
GOES_ON = 20
CALLS = {  # optimizer steps already done, whose next one is interrupted; "finish" where the run ends there
    "incubate": {
        "decides": 15,
        "learns": 20,
        "halves": 23,
        "judges": 29,
        "is let in": 31,
        "settles": 33,
        "commits": 39,
        "wakes": 47,
        "ends while it learns": (22, "finish"),
        "ends while it is let in": (32, "finish"),
    },
    "early": {"first event": None, "judgement": None, "ends": (60, "finish")},
}


class Interrupter:
    """Presses Ctrl-C at one line of ours.

    Args:
        at: Which, counted from 1; 0 counts all of them.
    """

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Trace calls into our files."""
        return self.line if frame.f_code.co_filename.startswith(HOME) else None

    def line(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Count a line."""
        if event == "line":
            self.count += 1
            if self.count == self.at:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return self.line


def called(loop: Loop, what: str, tracer: Interrupter) -> bool:
    """Make the call that is interrupted; returns whether it was."""
    real = getattr(loop.growth, what)

    def traced(*given: Any) -> Any:
        sys.settrace(tracer)
        try:
            return real(*given)
        finally:
            sys.settrace(None)

    object.__setattr__(loop.growth, what, traced)
    try:
        if what == "step":
            loop.step()
        else:
            loop.growth.finish()
    except KeyboardInterrupt:
        return True
    finally:
        object.__delattr__(loop.growth, what)
    return False


def tried(loop: Loop, what: str, at: int) -> str:
    """Interrupt, train on and end; returns what went wrong."""
    if not called(loop, what, Interrupter(at)) and at:
        return "it was not interrupted"
    try:
        if not loop.growth.finished:
            loop.step(GOES_ON)
            loop.growth.finish()
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"going on: {type(error).__name__}: {error}"[:200] + f" at {where.filename}:{where.lineno}"
    return "; ".join(loop.faults())


def lines_of(loop: Loop, what: str) -> int:
    """Count the lines of a call, in a child."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        tracer = Interrupter(0)
        called(loop, what, tracer)
        os.write(writer, str(tracer.count).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        count = int(told.read())
    os.waitpid(pid, 0)
    return count


def events(recipe: str) -> dict[str, int]:
    """Find at which steps an early run holds its first event, and judges it."""
    loop, found = Loop("pair", recipe), dict[str, int]()
    for step in range(150):
        before = loop.growth.loop.early.open
        loop.step()
        after = loop.growth.loop.early.open
        if before is None and after is not None:
            found.setdefault("first event", step)
        if before is not None and after is not before:
            found.setdefault("judgement", step)
    loop.growth.finish()
    return found


def main(host: str, recipe: str, name: str, points: int) -> None:
    warnings.simplefilter("ignore")
    given: Any = CALLS[recipe][name]
    stop, what = (given, "step") if isinstance(given, int) else given or (events(recipe)[name], "step")
    loop = Loop(host, recipe)
    loop.step(stop)
    total = lines_of(loop, what)
    points = min(points, total)
    chosen = sorted({1 + (total - 1) * i // max(points - 1, 1) for i in range(points)})
    said = {at: in_a_child(lambda at=at: tried(loop, what, at)) for at in chosen}
    faults = [[at, fault] for at, fault in said.items() if fault]
    print(json.dumps({"lines": total, "tries": len(chosen), "faults": faults}))


if __name__ == "__main__":
    assert threading.active_count() == 1
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
