"""``esper doctor``: what is installed, what is missing, and how to get it."""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata
from typing import Annotated, TypedDict

import typer

from esper.cli.application import FAILED
from esper.cli.output import print_json, say

DISTRIBUTION = "esper-morph"
_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)(?:\[([^\]]*)\])?")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")


class Extra(TypedDict):
    """An extra: its packages with their versions, and how to get it where one is missing."""

    present: bool
    packages: dict[str, str | None]
    install: str | None


class Torch(TypedDict):
    """What torch runs on."""

    version: str
    threads: int
    cuda: list[str]  # names of devices


class Examination(TypedDict):
    """An installation; versions are None where a package is missing."""

    esper: str | None
    python: str
    system: str
    cores: int
    threads: str | None
    complete: bool
    core: dict[str, str | None]
    torch: Torch | None
    extras: dict[str, Extra]


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is installed, what is missing and how to get it; exit 1 if the core is incomplete."""
    found = examine()
    if json:
        print_json(found)
    else:
        print_examination(found)
    if not found["complete"]:
        raise typer.Exit(FAILED)


def examine() -> Examination:
    """Look at this installation: versions are None where a package is missing."""
    needs = requirements()
    core = {name: version(name) for name in sorted(needs.pop("", ()))}
    extras: dict[str, Extra] = {}
    for extra, names in sorted(needs.items()):
        packages = {name: version(name) for name in sorted(names)}
        present = None not in packages.values()
        line = None if present else f"pip install '{DISTRIBUTION}[{extra}]'"
        extras[extra] = {"present": present, "packages": packages, "install": line}
    return {
        "esper": version(DISTRIBUTION),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "complete": None not in core.values(),
        "core": core,
        "torch": torch_facts() if core.get("torch") else None,
        "extras": extras,
    }


def requirements() -> dict[str, set[str]]:
    """Read what the distribution declares: packages by extra, the core under the empty name.

    An extra that asks for another extra of ours holds that one's packages too.
    """
    needs: dict[str, set[str]] = {}
    includes: dict[str, set[str]] = {}
    try:
        declared = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # run from a source tree that is not installed
        return needs
    for line in declared:
        match, marker = _REQUIREMENT.match(line), _EXTRA.search(line)
        if match is None:
            continue
        extra = marker.group(1) if marker else ""
        needs.setdefault(extra, set())
        if match.group(1).lower() == DISTRIBUTION:
            includes.setdefault(extra, set()).update((match.group(2) or "").split(","))
        else:
            needs[extra].add(match.group(1))
    for extra in includes:
        needs[extra] |= _included(extra, needs, includes)
    return needs


def _included(extra: str, needs: dict[str, set[str]], includes: dict[str, set[str]]) -> set[str]:
    found = set(needs.get(extra, ()))
    for other in includes.get(extra, ()):
        found |= _included(other, needs, includes)
    return found


def version(package: str) -> str | None:
    """Read an installed package's version; None where it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def torch_facts() -> Torch:
    """Ask torch what it runs on."""
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"version": torch.__version__, "threads": torch.get_num_threads(), "cuda": devices}


def print_examination(found: Examination) -> None:
    """Print what ``examine`` found, one fact per line."""
    say(f"esper-morph {found['esper'] or 'is not installed, only its source is on the path'}")
    say(f"Python {found['python']} on {found['system']}, {found['cores']} cores")
    if found["torch"]:
        devices = ", ".join(found["torch"]["cuda"]) or "no CUDA device"
        say(f"torch {found['torch']['version']}: {found['torch']['threads']} threads, {devices}")
    for name, installed in found["core"].items():
        say(f"  {name:<20} {installed or f'MISSING: pip install {name}'}")
    for extra, facts in found["extras"].items():
        state = "present" if facts["present"] else f"missing, get it with: {facts['install']}"
        say(f"extra {extra}: {state}")
        for name, installed in facts["packages"].items():
            say(f"  {name:<20} {installed or 'missing'}")
