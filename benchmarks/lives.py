"""One life of a run that will be killed: a process that says what it does, and its killer's view of it."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MODULE = "benchmarks.lives"
READING, SNAPSHOT, WRITING, DELETING = "reading", "snapshot", "writing", "deleting"
COMMITS = {"widen": "widening", "graft": "grafting"}
MOMENTS = (READING, SNAPSHOT, WRITING, DELETING, *COMMITS.values())
EVERY, KEEP = 3, 3  # steps between checkpoints, and how many of them stay


class Life:
    """A process and what it said; killed from outside.

    Args:
        command: Of the process.
    """

    def __init__(self, command: Sequence[str]) -> None:
        born = time.monotonic()
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        root = Path(__file__).resolve().parents[1]
        self.process = subprocess.Popen(
            [sys.executable, *command, repr(born)], stdout=subprocess.PIPE, text=True, cwd=root, env=env
        )
        self.lines: list[tuple[float, str]] = []
        self.news = threading.Condition()
        self.over = False
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                with self.news:
                    self.lines.append((time.monotonic(), line.rstrip("\n")))
                    self.news.notify_all()
        with self.news:
            self.over = True
            self.news.notify_all()

    def wait(self, wanted: Callable[[str], bool]) -> str | None:
        """Wait for a line; None if the process ended without it."""
        seen = 0
        with self.news:
            while True:
                for _, line in self.lines[seen:]:
                    if wanted(line):
                        return line
                seen = len(self.lines)
                if self.over:
                    return None
                self.news.wait()

    def kill(self) -> bool:
        """Kill it; False where it had ended by then."""
        self.process.kill()
        self.end()
        return self.process.returncode == -signal.SIGKILL

    def end(self) -> None:
        """Wait for its end."""
        self.process.wait()
        self.reader.join()

    def said(self, word: str) -> dict[str, Any] | None:
        """Return the facts of the first line that begins with a word."""
        found = [line for _, line in self.lines if line.startswith(f"{word} ")]
        return json.loads(found[0].partition(" ")[2]) if found else None

    def inside(self) -> set[str]:
        """Name the moments that it entered and never left."""
        opened: dict[str, int] = defaultdict(int)
        for _, line in self.lines:
            word, _, moment = line.partition(" ")
            opened[moment] += {"in": 1, "out": -1}.get(word, 0)
        return {moment for moment, count in opened.items() if count > 0}

    def steps(self) -> tuple[int, str]:
        """Return the last step done and the stages it left seeds in; 0 where there was none."""
        done = [line.split() for _, line in self.lines if line.startswith("step ")]
        return (int(done[-1][1]), done[-1][2]) if done else (0, "")

    def lengths(self) -> dict[str, float]:
        """Return the median seconds of every moment, and of a step."""
        begun: dict[str, float] = {}
        taken: dict[str, list[float]] = defaultdict(list)
        for now, line in self.lines:
            word, _, moment = line.partition(" ")
            if word == "step":
                moment = word
            if word in ("out", "step") and moment in begun:
                taken[moment].append(now - begun[moment])
            if word in ("in", "step"):
                begun[moment] = now
        return {moment: statistics.median(times) for moment, times in taken.items()}


# -- the program ---------------------------------------------------------------------------------------------


def say(line: str) -> None:
    """Tell the killer, at once and whole, from any thread."""
    os.write(1, f"{line}\n".encode())


def around(owner: Any, name: str, moment: Callable[..., str]) -> None:
    """Say when a method is entered and when it is left."""
    call = getattr(owner, name)

    def marked(*given: Any, **named: Any) -> Any:
        what = moment(*given)
        say(f"in {what}")
        try:
            return call(*given, **named)
        finally:
            say(f"out {what}")

    setattr(owner, name, marked)


def main(folder: str, rounds: str, born: str) -> None:
    """Train from wherever the newest checkpoint is, to the end."""
    import torch
    import torch._dynamo  # torch's first optimizer imports it: half of torch's own start

    imported = time.monotonic() - float(born)

    from benchmarks.lifecycle import Journey, digest
    from esper.checkpoint import FolderStorage

    torch.set_num_threads(1)
    storage = FolderStorage(folder)
    around(storage, "put", lambda *_: WRITING)
    around(storage, "delete", lambda *_: DELETING)
    run = Journey(storage, 0, every=EVERY, rounds=int(rounds), keep=KEEP)
    around(run.manager, "_snapshot", lambda *_: SNAPSHOT)
    around(
        run.growth.run.parts.committer,
        "commit",
        lambda _kernel, _own, decision, *_: COMMITS[decision.action],
    )
    say(f"in {READING}")
    run.resume()
    say(f"out {READING}")
    first = run.manager.steps

    def after() -> None:
        step = run.manager.steps
        if step == first + 1:
            facts = {"back": time.monotonic() - float(born), "imported": imported, "from": first}
            say(f"back {json.dumps(facts)}")
        say(f"step {step} {'+'.join(sorted(run.stages[step]))}")

    run.train(after)
    run.manager.close()
    end = run.end()
    plans = [type(plan).__name__ for plan in run.growth.plans]
    say(f"end {json.dumps({'digest': digest(end), 'plans': plans})}")


if __name__ == "__main__":
    main(*sys.argv[1:])
