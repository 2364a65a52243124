"""Whether a run may have a folder: a new one, one to go on in, or one that is moved out of its way."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from esper.errors import RunError
from esper.nissa.run.journal import EVENTS_FILE, OTHER
from esper.storage.lease import LEASE_FILE, Lease

CHECKPOINTS = "checkpoints"  # below a run's folder


def claim(folder: Path, *, resume: bool, fresh: bool) -> Path | None:
    """Let a run begin, or go on, in a folder.

    Args:
        folder: Path of the run's folder.
        resume: True to go on with the run that is there.
        fresh: True to move that out of the way.

    Returns:
        Where the earlier run is now, if it was moved.

    Raises:
        RunError: Another run is in the folder; the message names the ways on.
    """
    held = holds(folder)
    if held is None or (resume and not fresh):
        return None
    if not fresh:
        raise RunError(
            f"{folder} holds a run already ({held}); to go on with it: --resume auto; to begin anew: "
            "--fresh, which moves it aside; or give another --run-dir"
        )
    try:
        lease = Lease(folder, OTHER)
        try:
            place = folder.resolve()
            aside = beside(place)
            os.rename(place, aside)
        finally:
            lease.release()
            (aside / LEASE_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise RunError(
            f"cannot move {folder} aside: {error.strerror or error}; give another --run-dir"
        ) from None
    return aside


def holds(folder: Path) -> str | None:
    """Say what of a run is in a folder; None: nothing.

    Raises:
        RunError: The folder cannot be read.
    """
    events, kept = folder / EVENTS_FILE, folder / CHECKPOINTS
    try:
        if kept.is_dir() and (names := sorted(path.name for path in kept.glob("step-*"))):
            return f"its newest checkpoint is {names[-1]}"
        if events.is_file() and (size := events.stat().st_size):
            return f"{size:,} bytes of events"
        return "its model" if (folder / "model").is_dir() else None
    except OSError as error:
        raise RunError(f"cannot read {folder}: {error.strerror or error}; give another --run-dir") from None


def beside(place: Path) -> Path:
    """Return a free name for an earlier run, with the time it was moved.

    Raises:
        RunError: None of a hundred names is free.
    """
    stem = f"{place.name}.{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    names = [stem, *(f"{stem}-{number}" for number in range(2, 100))]
    for name in names:
        if not os.path.lexists(place.with_name(name)):
            return place.with_name(name)
    raise RunError(f"{place.with_name(stem)} and 98 more exist; give another --run-dir")
