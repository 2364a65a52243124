"""``esper blueprints``: what may grow, and whether a blueprint of one's own is sound."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from typing import Annotated, Any

import typer

from esper.cli.application import FAILED
from esper.cli.output import print_json, say

blueprints = typer.Typer(
    help="List, show and check blueprints: the small networks that may grow, as data.", no_args_is_help=True
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SECONDS = 60.0
WORDS = {True: "pass", False: "FAIL", None: "skip"}


@blueprints.command("list")
def list_blueprints(json: Json = False) -> None:
    """List the catalogue, other packages' blueprints included."""
    from esper.blueprints import CATALOGUE

    rows = [_row(CATALOGUE.get(name)) for name in CATALOGUE.names()]
    if json:
        print_json(rows)
        return
    say(f"{'name':<20} {'layouts':<16} {'ports':<16} {'parameters':>10}  summary")
    for row in rows:
        note = " (experimental)" * row["experimental"]
        say(
            f"{row['name']:<20} {','.join(row['layouts']):<16} {','.join(row['ports']):<16} "
            f"{row['parameters']:>10}  {row['summary']}{note}"
        )


@blueprints.command()
def show(
    name: Annotated[str, typer.Argument(help="A blueprint's name, or a JSON file.")],
    hidden: Annotated[int | None, typer.Option(min=1, help="The free width costs are stated for.")] = None,
    json: Json = False,
) -> None:
    """Show a blueprint: its nodes as lines, where it comes from, and what it costs at typical places."""
    import json as text

    graph = find(name)
    costs = _costs(graph, hidden)
    if json:
        facts = {
            "digest": graph.digest(),
            "affine": graph.affine,
            "scales": graph.scales,
            "mixes": graph.mixes,
        }
        print_json({**text.loads(graph.to_json()), **facts, "costs": costs})
        return
    note = ", experimental" * graph.experimental
    say(f"{graph.name}: {graph.summary}{note}")
    say(f"source: {graph.source}")
    say(f"for {', '.join(graph.layouts)}; ports {', '.join(graph.ports)}; digest {graph.digest()[:12]}")
    merge = "affine: can be merged into a layer" if graph.affine else "not affine: stays a branch"
    say(f"{merge}; mixes positions: {graph.mixes}")
    for line in _lines(graph):
        say(f"  {line}")
    for cost in costs:
        say(f"{cost['place']}: {cost['parameters']} parameters, {cost['flops']} FLOPs for {cost['input']}")


@blueprints.command()
def check(
    file: Annotated[str, typer.Argument(help="A JSON file, or the name of a blueprint.")],
    seconds: Annotated[float, typer.Option(min=1, help="Stop, and fail, after so long.")] = SECONDS,
    json: Json = False,
) -> None:
    """Prove a blueprint: identity start, shapes, gradients, export, learnability …; exit 1 if one fails."""
    from esper.testing.blueprint import Check, checks

    graph, started = find(file), time.monotonic()
    results: list[Check] = []
    for result in checks(graph):
        results.append(result)
        if not json:
            _print_check(result)
        if time.monotonic() - started > seconds:
            late = Check("time", result.place, False, f"stopped after {seconds:g} s; the rest is not proven")
            results.append(late)
            if not json:
                _print_check(late)
            break
    passed = all(result.passed is not False for result in results)
    if json:
        print_json({"name": graph.name, "passed": passed, "checks": [asdict(result) for result in results]})
    else:
        failures = sum(result.passed is False for result in results)
        spent = time.monotonic() - started
        say(f"{graph.name}: {len(results)} checks, {failures} failed, {spent:.1f} s")
    if not passed:
        raise typer.Exit(FAILED)


def find(name: str) -> Any:
    """Return a blueprint by its name, or read it from a file.

    Raises:
        BlueprintError: The file cannot be read or is no valid blueprint.
        RegistryError: There is neither such a file nor such a name.
    """
    from esper.blueprints import CATALOGUE
    from esper.kasmina.branches.choice import read_graph

    if not name.endswith(".json") and not os.path.isfile(name):
        return CATALOGUE.get(name)
    return read_graph(name)


def _row(graph: Any) -> dict[str, Any]:
    from esper.blueprints.representative import HIDDEN, describe, representative

    places = representative(graph)
    program = graph.lower(places[0], HIDDEN) if places else None
    return {
        "name": graph.name,
        "layouts": list(graph.layouts),
        "ports": list(graph.ports),
        "parameters": program.parameter_count() if program else None,
        "place": describe(places[0]) if places else None,
        "hidden": HIDDEN,
        "experimental": graph.experimental,
        "affine": graph.affine,
        "mixes": graph.mixes,
        "summary": graph.summary,
    }


def _costs(graph: Any, hidden: int | None) -> list[dict[str, Any]]:
    import torch

    from esper.blueprints.kernel import GraphKernel
    from esper.blueprints.representative import HIDDEN, describe, representative
    from esper.blueprints.sizes import example_shapes
    from esper.kasmina.recording.flops import FlopMeter

    costs: list[dict[str, Any]] = []
    for place in representative(graph):
        program = graph.lower(place, hidden or HIDDEN)
        shape = (1, *example_shapes(place)[0][0][1:])
        with torch.no_grad(), FlopMeter() as meter:
            GraphKernel(program)(torch.zeros(shape))
        costs.append(
            {
                "place": describe(place),
                "hidden": hidden or HIDDEN,
                "parameters": program.parameter_count(),
                "flops": meter.total,
                "input": list(shape),
            }
        )
    return costs


def _lines(graph: Any) -> list[str]:
    lines: list[str] = []
    for one in graph.structure.order:
        given = [*one.inputs, *(f"{name}={value}" for name, value in one.attributes)]
        end = "   # starts at zero" * (one.name == graph.structure.last)
        lines.append(f"{one.name} = {one.op}({', '.join(given)}){end}")
    return [*lines, f"return {graph.output}"]


def _print_check(result: Any) -> None:
    say(f"{WORDS[result.passed]}  {result.name:<13} {result.place}: {result.detail}")
