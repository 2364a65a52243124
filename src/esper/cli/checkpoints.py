"""``esper checkpoints``: what a folder of checkpoints holds, whether it is sound, and what of it to keep."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import typer

from esper.cli.application import FAILED
from esper.cli.output import print_json, say
from esper.errors import StateError, nearest
from esper.nissa.wording import short
from esper.printable import printable, quoted
from esper.storage.protocol import Storage

checkpoints = typer.Typer(
    help="List, verify, prune and export checkpoints in PLACE: a run's folder, its checkpoints', or a URL.",
    no_args_is_help=True,
)
Place = Annotated[str, typer.Argument(help="A folder, or a URL like s3://bucket/prefix.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Names = Annotated[list[str] | None, typer.Argument(help="Checkpoints by name or step; all by default.")]
MOST_DIGITS = 18  # of a step
MOST_PLACE = 1000  # characters of a path that a message repeats
INSIDE = "checkpoints"  # of a run's folder


class Row(TypedDict):
    """A checkpoint as lists print it; of a damaged one nothing is known but why."""

    name: str
    damaged: str | None
    step: NotRequired[int]
    time: NotRequired[float]  # seconds since the epoch
    bytes: NotRequired[int]
    metrics: NotRequired[dict[str, float | None]]
    code: NotRequired[dict[str, str]]  # versions
    summary: NotRequired[Mapping[str, Any]]  # JSON that the manifest holds


@checkpoints.command("list")
def list_checkpoints(place: Place, json: Json = False) -> None:
    """List checkpoints, oldest first; a damaged one is listed with the reason. Parts are not read."""
    from esper.checkpoint.format.manifest import read_manifest

    storage, names = opened(place)
    rows: list[Row] = []
    for name in names:
        try:
            manifest = read_manifest(storage, name)
        except StateError as error:
            rows.append({"name": name, "damaged": str(error)})
            continue
        rows.append(
            Row(
                name=name,
                damaged=None,
                step=manifest.step,
                time=manifest.time,
                bytes=manifest.size,
                metrics=dict(manifest.metrics),
                code=dict(manifest.code),
                summary=manifest.summary,
            )
        )
    if json:
        print_json([flat(row) for row in rows])
    elif rows:
        say("\n".join(table(rows)))
    else:
        say(f"no checkpoints in {storage}")


@checkpoints.command()
def verify(place: Place, names: Names = None, json: Json = False) -> None:
    """Check every part against its digest; a damaged part is named, and the exit status is 1."""
    from esper.checkpoint.format.manifest import damage

    storage, known = opened(place)
    wanted = [find(known, one) for one in names] if names else known
    found = {name: dict(damage(storage, name)) for name in wanted}
    damaged = {name: parts for name, parts in found.items() if parts}
    if json:
        print_json({"verified": [name for name in wanted if name not in damaged], "damaged": damaged})
    elif wanted:
        say("\n".join(verdicts(found)))
        say(f"{len(wanted) - len(damaged)} of {len(wanted)} checkpoints in {storage} are sound")
    else:
        say(f"no checkpoints in {storage}")
    if damaged:
        raise typer.Exit(FAILED)


@checkpoints.command()
def prune(
    place: Place,
    keep: Annotated[int, typer.Option(help="How many of the newest sound ones to keep; at least 1.")] = 3,
    best: Annotated[
        str | None, typer.Option(help="Keep the best besides, by a metric: loss:min, accuracy:max.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    json: Json = False,
) -> None:
    """Delete old checkpoints; all are verified first, and the newest sound one always stays."""
    from esper.checkpoint.format.reader import sound_among
    from esper.checkpoint.retention import Retention

    storage, names = opened(place)
    rule = Retention(keep, metric_of(best))
    sound = sound_among(storage, names)
    deleted = rule.superfluous(names, sound)
    for name in deleted if not dry_run else ():
        storage.delete(name)
    kept = [name for name in names if name not in deleted]
    damaged = [name for name in names if name not in sound]
    if json:
        print_json({"kept": kept, "deleted": deleted, "damaged": damaged, "dry_run": dry_run})
        return
    done = "would be deleted" if dry_run else "deleted"
    for name in names:
        why = "damaged" if name in damaged else "the best" if name == rule.best_of(sound) else ""
        say(f"{name:<14} {done if name in deleted else 'kept':<16} {why}".rstrip())
    say(f"{len(deleted)} of {len(names)} checkpoints in {storage} {'would go' if dry_run else 'are gone'}")


@checkpoints.command()
def export(
    place: Place,
    to: Annotated[Path, typer.Argument(help="The folder to write; esper.load_into loads it.")],
    name: Annotated[
        str | None, typer.Option(help="A checkpoint by name or step; the newest sound one by default.")
    ] = None,
    best: Annotated[
        str | None, typer.Option(help="The best sound one, by a metric: loss:min, accuracy:max.")
    ] = None,
    json: Json = False,
) -> None:
    """Write a checkpoint's model as a saved model: for esper.load_into, or for torch alone."""
    from esper.checkpoint.exporting import export_model
    from esper.checkpoint.format.reader import newest, read

    if name is not None and best is not None:
        raise typer.BadParameter("--name and --best both choose a checkpoint; give one of them")
    storage, names = opened(place)
    told: list[str] = []
    if best is not None:
        name = best_among(storage, names, best)
    found = newest(storage, told.append) if name is None else read(storage, find(names, name))
    if found is None:
        raise StateError(f"{storage} holds no sound checkpoint: {'; '.join(told) or 'it is empty'}")
    export_model(found, to, storage)
    if json:
        print_json({"checkpoint": found.manifest.name, "model": str(to), "passed_over": told})
        return
    for line in told:
        say(line)
    say(f"{to}: the model of {found.manifest.name}; seeds that were awake are not part of it")


def opened(place: str) -> tuple[Storage, list[str]]:
    """Return the storage in a run's folder, in a folder itself, or at a URL, and its checkpoints.

    Raises:
        StateError: There is no such folder.
    """
    from esper.checkpoint.format.reader import steps_kept
    from esper.storage.address import storage_at

    folder = Path(place)
    if "://" not in place and not os.path.isdir(folder):  # Path's own raises where a name is too long
        said = folder if len(place) <= MOST_PLACE else quoted(place)
        raise StateError(f"no folder {said}; give a run's folder, or the one CheckpointManager was given")
    inside = "://" not in place and (folder / INSIDE).is_dir()
    storage = storage_at(str(folder / INSIDE) if inside else place)
    return storage, steps_kept(storage)


def find(known: list[str], asked: str) -> str:
    """Return the checkpoint of a name or a step.

    Raises:
        StateError: There is none.
    """
    name = f"step-{int(asked):08d}" if asked.isdecimal() and len(asked) <= MOST_DIGITS else asked
    if name not in known:
        raise StateError(f"no checkpoint {quoted(asked)}; {nearest(name, known)}")
    return name


def best_among(storage: Storage, names: list[str], asked: str) -> str:
    """Return the best sound checkpoint by a metric.

    Raises:
        StateError: No sound one knows it.
    """
    from esper.checkpoint.format.reader import sound_among
    from esper.checkpoint.retention import Retention

    sound = sound_among(storage, names)
    found = Retention(None, metric_of(asked)).best_of(sound)
    if found is None:
        known = sorted({metric for manifest in sound.values() for metric in manifest.metrics})
        raise StateError(
            f"no sound checkpoint in {storage} knows {quoted(asked)}; known: {', '.join(known) or 'none'}"
        )
    return found


def verdicts(found: dict[str, dict[str, str]]) -> list[str]:
    """Write what verifying found as lines: one per checkpoint, and one per damaged part below it."""
    lines = [f"{'checkpoint':<14} state"]
    for name, parts in found.items():
        lines.append(f"{name:<14} {'damaged' if parts else 'sound'}")
        lines += [f"  {part}" for part in parts.values()]
    return lines


def metric_of(text: str | None) -> tuple[str, Literal["min", "max"]] | None:
    """Read ``loss:min``."""
    if text is None:
        return None
    name, _, sense = text.rpartition(":")
    if not name or sense not in ("min", "max"):
        raise typer.BadParameter(f"--best {text!r} is not a metric and min or max, as in loss:min")
    return name, sense


def flat(row: Row) -> dict[str, object]:
    """Lay a row's summary out beside what every checkpoint has."""
    facts = {name: value for name, value in row.items() if name != "summary"}
    return {**facts, **row.get("summary", {})}


def table(rows: list[Row]) -> list[str]:
    """Write the list as lines."""
    lines = [
        f"{'checkpoint':<14} {'written':<20} {'bytes':>12} {'parameters':>12} {'grown':>5}  awake, metrics"
    ]
    for row in rows:
        if row["damaged"] is not None:
            lines.append(f"{row['name']:<14} damaged: {row['damaged']}")
            continue
        when = datetime.datetime.fromtimestamp(row["time"], datetime.UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        summary = row["summary"]
        more = [
            *summary.get("awake", []),
            *(f"{name} {short(value)}" for name, value in row["metrics"].items()),
        ]
        parameters, grown = shown(summary.get("parameters")), shown(summary.get("grown"))
        lines.append(
            f"{row['name']:<14} {when:<20} {row['bytes']:>12,} {parameters:>12} {grown:>5}  "
            f"{', '.join(more)}".rstrip()
        )
    return [printable(line, keep="") for line in lines]


def shown(count: int | None) -> str:
    """Write a count that a checkpoint may not say."""
    return "–" if count is None else f"{count:,}"
