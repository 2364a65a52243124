"""Verdicts kept on disk, a line each as soon as it is there: a run that was cut off goes on where it was."""

from __future__ import annotations

import hashlib
import json
import threading
from functools import lru_cache
from pathlib import Path

from benchmarks.nursery import Ending, Trial, Verdict


class Tried:
    """What is known of trials on one tree; a changed source or test anywhere makes all of it unknown.

    Args:
        root: Of the tree.
        path: File of verdicts; None keeps none.
    """

    def __init__(self, root: Path, path: Path | None) -> None:
        self.root, self.path = root, path
        self.lock = threading.Lock()
        self.known: dict[str, Verdict] = {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]  # the last line may be cut off
        if whole != content:
            path.write_bytes(whole)
        for line in whole.splitlines():
            one = json.loads(line)
            trial = one.pop("trial")
            self.known[trial] = Verdict(**one)

    def get(self, trial: Trial) -> Verdict | None:
        return self.known.get(self._key(trial))

    def put(self, trial: Trial, verdict: Verdict) -> None:
        """Remember a verdict, unless the machine rather than the mutant made it."""
        if self.path is None or verdict.ending == Ending.LATE:
            return
        line = json.dumps({"trial": self._key(trial), **vars(verdict)}) + "\n"
        with self.lock, self.path.open("a", encoding="utf-8") as lines:
            lines.write(line)

    def _key(self, trial: Trial) -> str:
        tops = sorted({Path(one).parts[0] for one in (trial.path, *trial.tests)})
        facts = [trial.path, trial.text, trial.tests, [tree(self.root / top) for top in tops]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@lru_cache
def tree(top: Path) -> str:
    """Return the digest of one Python file or of all below a folder; of nothing for an option of pytest's."""
    found = hashlib.sha256()
    for path in sorted(top.rglob("*.py")) if top.is_dir() else [top] * top.is_file():
        found.update(f"{path}\0".encode() + path.read_bytes())
    return found.hexdigest()
