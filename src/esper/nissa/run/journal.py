"""The journal of a run: one JSON line per event, appended to ``events.jsonl`` and never rewritten."""

from __future__ import annotations

import json
import math
import os
import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeAlias

from esper.contracts import EVENTS_VERSION, Event
from esper.errors import RunError
from esper.files import read_regular
from esper.log import LOGGER
from esper.nissa.run.damage import MOST_JOURNAL, is_object, left_out, require_types, spoiled
from esper.nissa.run.facts import DecisionFacts
from esper.nissa.run.standing import BEGINS, decided_after
from esper.printable import quoted
from esper.storage.lease import Lease

EVENTS_FILE = "events.jsonl"
PATIENCE = 64 * 2**20  # bytes of events that may wait for room on the disk
# Told before growth applies them, or where the run went: these survive a machine that loses its power.
DURABLE = frozenset(
    {
        "decision",
        "gate",
        "widened",
        "grafted",
        "deepened",
        "taken_back",
        "outcome",
        "resumed",
        "rolled_back",
    }
)


OTHER = "another run_dir"
Plain: TypeAlias = (
    "str | bool | int | float | dict[str, Plain] | list[Plain] | None"  # what strict JSON holds
)


class RunJournal:
    """Writes every event it is called with to a run folder; an existing folder is appended to.

    It has the folder for itself until it is closed: another process, or another journal of this one, is
    refused. Where the folder's file system has no locks, a warning says so.

    Each event is one ``write`` of one line on an unbuffered file, so a killed process loses at most the line
    it was writing; what growth decided is on the disk, not only with the system, when the call returns.
    Strict JSON has no NaN: non-finite numbers are written as the strings ``"NaN"``, ``"Infinity"`` and
    ``"-Infinity"``; ``number`` reads them back.

    Attributes:
        run: The run's id, told with every beginning; a run that goes on keeps the one it had. None: untold.
        config: Digest of what the run was asked to do, told with it.
    """

    def __init__(self, run_dir: str | Path, *, run: str | None = None, config: str | None = None) -> None:
        """Open the folder, and create it where it does not exist.

        Raises:
            RunError: The folder cannot be written, or another journal is open there.
        """
        if not isinstance(run_dir, str | Path) or "\0" in str(run_dir):
            raise RunError(f"run_dir={quoted(run_dir)} is no path; give the folder of the run")
        self.path = Path(os.path.abspath(run_dir)) / EVENTS_FILE  # the process may go elsewhere
        self.run, self.config = run, config
        self._lease = _lease(Path(run_dir))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            cut, last = _mend(self.path)
            self._file: BinaryIO = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise RunError(
                f"cannot write the run folder {run_dir}: {error.strerror or error}; choose another run_dir"
            ) from None
        self._begun = self._file.tell()
        self._waiting = bytearray()  # what did not fit on the disk yet
        self._told = self._gone = False
        weakref.finalize(
            self, self._file.close
        )  # a run that is given up without finish() leaves no open file
        if cut:
            self(left_out(self.path, cut, last))

    def __call__(self, event: Event) -> None:
        """Append one event.

        Raises:
            RunError: The journal is closed, the event holds what JSON cannot, or the disk has been full until
                more waits than memory should hold.
        """
        if self._file.closed:
            raise RunError(
                f"{self.path} is closed, so the event {event.kind!r} was not written; open a new RunJournal"
            )
        if event.kind in BEGINS and self.run is not None:
            event = replace(event, data={**event.data, "run": self.run, "config": self.config})
        self._waiting += encode(event)
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
            if event.kind in DURABLE:
                os.fsync(self._file.fileno())
        except OSError as error:
            self._keep(error)
        else:
            self._told = False
            self._see_whether_it_is_there()
        if event.kind == "run_finished" and self._lease is not None:
            self._lease.release()  # another run may have the folder, while this one's objects live on

    def _see_whether_it_is_there(self) -> None:
        """Say so, once, where somebody has deleted the file: what is written to it since is lost."""
        if not self._gone and os.fstat(self._file.fileno()).st_nlink == 0:
            self._gone = True
            LOGGER.warning(
                "%s was deleted while its run goes on: its events are lost, training is not; to keep the "
                "grown model call growth.save with another folder",
                quoted(str(self.path)),
            )

    def _keep(self, error: OSError) -> None:
        """Let training go on where the disk is full: events wait in memory, and one warning says so."""
        if len(self._waiting) > PATIENCE:
            raise RunError(
                f"cannot append to {self.path}: {error.strerror}, and {len(self._waiting)} bytes wait; free "
                "space and resume the run"
            )
        if not self._told:
            self._told = True
            warnings.warn(
                f"cannot append to {self.path}: {error.strerror}; training goes on and events wait in "
                "memory, where a killed run loses them: free space",
                RuntimeWarning,
                stacklevel=3,
            )

    def decided_after(self, step: int) -> dict[int, DecisionFacts]:
        """Return the decisions a run that goes on from ``step`` takes again, data by step.

        Raises:
            RunError: The journal is damaged.
        """
        return decided_after(read_events(self.path.parent), step)

    def take_back(self) -> None:
        """Forget every event since this journal was opened, and close it: what they tell of did not begin."""
        self._waiting.clear()
        with suppress(OSError):
            if self._begun:
                self._file.truncate(self._begun)
            else:
                self.path.unlink()
        self.close()

    def close(self) -> None:
        """Close the file; the folder can be opened again."""
        if self._waiting and not self._file.closed:
            with suppress(OSError):
                self._file.write(self._waiting)
        self._file.close()
        if self._lease is not None:
            self._lease.release()

    def __enter__(self) -> RunJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _lease(folder: Path) -> Lease | None:
    """Take the folder; None where it cannot be locked, which is told.

    Raises:
        RunError: Another journal is open there.
    """
    try:
        return Lease(folder, OTHER)
    except OSError as error:
        if os.path.isdir(folder):  # or opening the journal says more; a name too long is no folder
            warnings.warn(
                f"cannot lock the run folder {folder}: {error.strerror or error}; a second run in it would "
                "not be noticed, and both would be spoiled",
                RuntimeWarning,
                stacklevel=3,
            )
        return None


def read_events(run_dir: str | Path) -> list[Event]:
    """Read a run folder's events, oldest first.

    A torn last line (the run was killed while writing it), and damaged lines at the end, are left out and
    reported as a last event of kind ``warning``; damage before a whole line is refused.

    Raises:
        RunError: There is no journal, it is no regular file, or a line of it is damaged or of an unknown
            version.
    """
    path = Path(run_dir) / EVENTS_FILE
    if not os.path.lexists(path):
        raise RunError(
            f"no run in {run_dir}: {EVENTS_FILE} is missing; give the folder that esper demo, esper train or "
            f"run_dir= wrote{_runs_beside(Path(run_dir))}"
        )
    *lines, tail = _content(path).split(b"\n")
    if is_object(tail):  # only the line feed is missing
        lines, tail = [*lines, tail], b""
    lines, cut = _apart(lines, tail)
    events = [decode(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    if cut:
        events.append(left_out(path, cut, events[-1] if events else None))
    return events


def known_events(run_dir: str | Path) -> list[Event]:
    """Read what is known of a run that goes on; nothing where there is no journal or it is damaged."""
    try:
        return read_events(run_dir)
    except RunError:  # a view begins with less; whoever needs the journal is told why
        return []


def encode(event: Event) -> bytes:
    """Write an event as one line of strict JSON, line feed included.

    Raises:
        RunError: The event holds what JSON cannot.
    """
    where = f"event {event.kind!r}"
    record = {
        "v": EVENTS_VERSION,
        "time": event.time,
        "step": event.step,
        "kind": event.kind,
        "data": event.data,
    }
    return json.dumps(plain(record, where), allow_nan=False, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes, where: str) -> Event:
    """Read one line back; ``where`` names it in errors.

    Raises:
        RunError: The line is damaged, or of a version or kind this Esper does not know.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise RunError(f"{where} is damaged ({line[:40]!r}…); restore the file from a copy") from None
    if not isinstance(record, dict) or "v" not in record:
        raise RunError(f"{where} is not an event of Esper: it has no version; restore the file from a copy")
    if record["v"] != EVENTS_VERSION:
        raise RunError(
            f"{where} has version {quoted(record['v'])}, this Esper reads version {EVENTS_VERSION}; "
            "read the run with the version of Esper that wrote it"
        )
    try:
        kind, step, data, time = (record[name] for name in ("kind", "step", "data", "time"))
        require_types(kind, step, time, data, where)
        return Event(kind=kind, step=step, data=data, time=time)
    except RunError:
        raise
    except (KeyError, ValueError) as error:
        raise RunError(f"{where} is not a whole event: {error}; restore the file from a copy") from None


def number(value: float | str | None) -> float | None:
    """Read a number of an event back, non-finite ones included; None is "not measured" and stays None."""
    if value is None:
        return None
    return float(value)  # float() reads "NaN", "Infinity" and "-Infinity"


def plain(value: object, where: str) -> Plain:
    """Turn ``value`` into what strict JSON holds.

    Args:
        value: JSON value, or one that holds tuples and non-finite numbers.
        where: Name of what holds it, for messages.

    Raises:
        RunError: It is none, or a key is no text.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else _non_finite(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise RunError(f"{where} has the key {key!r}; keys must be strings")
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [plain(item, where) for item in value]
    raise RunError(
        f"{where} holds a {type(value).__name__}; events hold numbers, strings, lists and mappings only"
    )


def _non_finite(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _content(path: Path) -> bytes:
    """Read a journal, which lies in its folder itself: what it links to is not written to, so not read."""
    return read_regular(path, limit=MOST_JOURNAL, what="the journal", error=RunError, follow=False)


def _apart(lines: list[bytes], tail: bytes) -> tuple[list[bytes], bytes]:
    """Tell the whole lines from the damaged end."""
    sound = len(lines) - spoiled(lines)
    return lines[:sound], b"\n".join([*lines[sound:], tail])


def _mend(path: Path) -> tuple[bytes, Event | None]:
    """Make the file end in a whole line and a line feed, so that the next event starts a line.

    Returns:
        What had to be cut off, and the last whole event (reading it also refuses a file of another version).
    """
    if not os.path.lexists(path):
        return b"", None
    content = _content(path)
    *lines, tail = content.split(b"\n")
    ended = is_object(tail)
    lines, cut = _apart([*lines, tail], b"") if ended else _apart(lines, tail)
    last = decode(lines[-1], f"{path}, line {len(lines)}") if lines else None
    with open(path, "r+b") as file:
        if ended:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        file.truncate(sum(len(line) + 1 for line in lines))
    return cut, last


def _runs_beside(folder: Path) -> str:
    """Name the runs that do exist below a folder, or below the nearest existing folder above it."""
    base = next((place for place in (folder, *folder.parents) if os.path.isdir(place)), Path())
    found = sorted(path.parent.as_posix() for path in base.glob(f"*/{EVENTS_FILE}"))[:5]
    return f"; runs in {base.as_posix()}: {', '.join(found)}" if found else ""
