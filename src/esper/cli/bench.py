"""``esper bench``: run a promise's benchmark, or list them."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from esper.cli.output import print_json, say
from esper.errors import RegistryError, nearest
from esper.log import shown_elsewhere

FOLDER = "benchmarks"


def bench(
    name: Annotated[str | None, typer.Argument(help="The benchmark; without it, they are listed.")] = None,
    options: Annotated[
        list[str] | None, typer.Argument(help="Passed on: --seeds N, --json, …; -h lists what NAME knows.")
    ] = None,
) -> None:
    """Measure a promise and print it beside what was promised; exit 1 if it was missed."""
    wanted = [*([name] if name else []), *(options or [])]
    folder = find_folder()
    known = benches(folder)
    if not wanted or wanted == ["--json"]:
        if wanted:
            print_json(known)
        else:
            say("\n".join(f"{item:<20} {line}" for item, line in known.items()))
        return
    if wanted[0] not in known:
        raise RegistryError(f"no benchmark {wanted[0]!r} in {folder}; {nearest(wanted[0], known)}")
    sys.path.insert(
        0, str(folder.parent)
    )  # benches share modules, and their worker processes import them too
    module = importlib.import_module(f"{FOLDER}.{wanted[0].replace('-', '_')}")
    with shown_elsewhere():  # a bench prints what it measures
        raise typer.Exit(module.main(wanted[1:]))


def find_folder() -> Path:
    """Find the benchmarks: below the working directory, or in the checkout this Esper runs from.

    Raises:
        RegistryError: Neither place has them.
    """
    places = [Path.cwd() / FOLDER, Path(__file__).resolve().parents[3] / FOLDER]
    for place in places:
        if benches(place):
            return place
    raise RegistryError(
        f"no benchmarks in {' or '.join(map(str, places))}; they are not part of the installed package: "
        "run this in a checkout of the repository"
    )


def benches(folder: Path) -> dict[str, str]:
    """List a folder's benchmarks with their first docstring line, without importing any."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        if _has_main(tree.body):
            found[path.stem.replace("_", "-")] = (ast.get_docstring(tree) or "").split("\n", 1)[0]
    return found


def _has_main(body: Iterable[ast.stmt]) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in body)
