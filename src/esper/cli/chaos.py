"""``esper chaos``: break real runs of a config on purpose, and say what became of them."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, TypedDict

import typer

from esper.cli.application import FAILED
from esper.cli.output import print_json, say
from esper.errors import RegistryError, RunError, nearest
from esper.printable import printable, quoted

MAKER = "esper.cli.run.session:open_session"
DASH = "–"


class FaultRow(TypedDict):
    """What became of a run with one fault, as ``chaos.rehearsal.Result``."""

    fault: str
    survived: bool | None
    seconds: float | None
    steps_lost: int | None
    equal: bool | None
    reason: str | None
    what: str


class Rehearsed(TypedDict):
    """What became of a config's runs."""

    config: str
    seed: int
    steps: int
    seconds: float
    faults: list[FaultRow]
    survived: bool


def chaos(
    config: Annotated[Path | None, typer.Argument(help="The YAML file esper train reads.")] = None,
    faults: Annotated[str | None, typer.Option(help="Names, with commas between; all by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of when faults come and what they hit.")] = 0,
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of the config's.")] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Keep the runs here; without it they are deleted.")
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="List the faults and stop.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Put faults into runs of a config, each in processes of its own; exit 1 if one was not survived."""
    from esper.chaos.child import FAULTS

    names = chosen(faults, FAULTS.names())
    if listed:
        about = {name: FAULTS.get(name).about for name in names}
        if json:
            print_json(about)
        else:
            say("\n".join(f"{name:<22} {line}" for name, line in about.items()))
        return
    if config is None:
        raise typer.BadParameter("name the config to rehearse, or give --list")
    found = rehearse(config, names, seed, epochs, run_dir)
    if json:
        print_json(found)
    else:
        say("\n".join(lines(found)))
    if not found["survived"]:
        raise typer.Exit(FAILED)


def chosen(faults: str | None, known: list[str]) -> list[str]:
    """Read the names that are asked for.

    Raises:
        RegistryError: There is no such fault.
    """
    names = known if faults is None else [name.strip().replace("-", "_") for name in faults.split(",")]
    for name in names:
        if name not in known:
            raise RegistryError(f"no fault {quoted(name)}; {nearest(name, known)}")
    return names


def rehearse(
    config: Path, names: list[str], seed: int, epochs: int | None, run_dir: Path | None
) -> Rehearsed:
    """Run undisturbed and with every fault; return what became of them.

    Args:
        config: Path of the YAML file.
        names: Names of faults, in the order they are put in.
        seed: Seed of when faults come and what they hit.
        epochs: Number of epochs; None: the config's.
        run_dir: Path of the folder that keeps the runs; None: they are deleted.

    Raises:
        ConfigError: The config is wrong.
        RunError: The folder cannot be made.
    """
    from esper.chaos.rehearsal import Rehearsal
    from esper.cli.run.recipe import growth_settings, read_recipe

    growth_settings(config, read_recipe(config))  # a mistake is told before anything runs
    folder = Path(tempfile.mkdtemp(prefix="esper-chaos-")) if run_dir is None else run_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot keep runs in {folder}: {error.strerror}; give a folder") from None
    rehearsal = Rehearsal(MAKER, config, folder, seed=seed, epochs=epochs, tell=progress)
    try:
        whole = rehearsal.undisturbed()
        rows = [rehearsal.put(name) for name in names]
    finally:
        if run_dir is None:
            rehearsal.sweep()
    return {
        "config": str(config),
        "seed": seed,
        "steps": whole.steps,
        "seconds": whole.seconds,
        "faults": [FaultRow(**asdict(row)) for row in rows],
        "survived": all(row.survived is not False for row in rows),
    }


def progress(line: str) -> None:
    """Tell what is being done, beside the result."""
    say(f"chaos: {line}", error=True)


def lines(found: Rehearsed) -> list[str]:
    """Write one row per fault, and below what happened."""
    rows = found["faults"]
    drawn = [f"{'fault':<22} {'survived':<9} {'s to next step':>14} {'steps lost':>10}  bits equal"]
    for row in rows:
        survived = "skipped" if row["survived"] is None else told(row["survived"])
        seconds = DASH if row["seconds"] is None else f"{row['seconds']:.2f}"
        lost = DASH if row["steps_lost"] is None else str(row["steps_lost"])
        equal = f"{DASH} ({row['reason']})" if row["reason"] else told(row["equal"])
        drawn.append(f"{row['fault']:<22} {survived:<9} {seconds:>14} {lost:>10}  {equal}")
    drawn += ["", *(f"{row['fault']}: {row['what']}" for row in rows), ""]
    survived, skipped = (sum(row["survived"] is value for row in rows) for value in (True, None))
    drawn.append(f"{survived} of {len(rows) - skipped} survived, {skipped} skipped")
    drawn.append(f"a run has {found['steps']} steps and took {found['seconds']:.1f} s undisturbed")
    return [printable(line, keep="") for line in drawn]


def told(value: bool | None) -> str:
    """Write yes, no or unknown."""
    return DASH if value is None else "yes" if value else "no"
