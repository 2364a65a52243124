"""``esper blueprints``: what may grow, and whether a blueprint of one's own is sound."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated

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
    from esper.cli.blueprint_facts import row as row_of

    rows = [row_of(CATALOGUE.get(name)) for name in CATALOGUE.names()]
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

    from esper.cli.blueprint_facts import costs as costs_of
    from esper.cli.blueprint_facts import find, lines

    graph = find(name)
    costs = costs_of(graph, hidden)
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
    for line in lines(graph):
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
    from esper.cli.blueprint_facts import find
    from esper.testing.blueprint import Check, checks

    graph, started = find(file), time.monotonic()
    results: list[Check] = []
    for result in checks(graph):
        results.append(result)
        if not json:
            say(check_line(result.passed, result.name, result.place, result.detail))
        if time.monotonic() - started > seconds:
            late = Check("time", result.place, False, f"stopped after {seconds:g} s; the rest is not proven")
            results.append(late)
            if not json:
                say(check_line(late.passed, late.name, late.place, late.detail))
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


def check_line(passed: bool | None, name: str, place: str, detail: str) -> str:
    """Write what a check came to; None: it was skipped."""
    return f"{WORDS[passed]}  {name:<13} {place}: {detail}"
