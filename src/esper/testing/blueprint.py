"""The catalogue suite: what every blueprint must hold at every place it fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from esper.blueprints.graph import Graph
from esper.blueprints.representative import HIDDEN, describe, representative
from esper.contracts import Signature
from esper.errors import BlueprintError
from esper.testing.demands import DEMANDS, Subject

# What torch raises on valid calls it cannot carry out; anything else is an error of this suite.
RAISED = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class Check:
    """One demand on one blueprint at one place."""

    name: str
    place: str
    passed: bool | None  # None: could not be checked here
    detail: str  # what was measured, or why it failed


def check(
    graph: Graph,
    places: Sequence[Signature] | None = None,
    hidden: int = HIDDEN,
    seed: int = 0,
    device: torch.device | str = "cpu",
    demands: Sequence[str] | None = None,
) -> list[Check]:
    """Hold a blueprint to every demand at every place.

    Args:
        graph: Blueprint to prove.
        places: Signatures; the representative ones it fits by default.
        hidden: Its free width, in units.
        seed: Seed of weights and examples.
        device: Device to run on.
        demands: Names from ``DEMANDS``; all by default.
    """
    return list(checks(graph, places, hidden, seed, device, demands))


def checks(
    graph: Graph,
    places: Sequence[Signature] | None = None,
    hidden: int = HIDDEN,
    seed: int = 0,
    device: torch.device | str = "cpu",
    demands: Sequence[str] | None = None,
) -> Iterator[Check]:
    """Yield the results of :func:`check` one by one."""
    chosen = representative(graph) if places is None else places
    if not chosen:
        yield Check("fits", "", False, "it fits none of the representative places")
    for place in chosen:
        where = describe(place)
        if reason := graph.misfit(place):
            yield Check("fits", where, False, reason)
            continue
        try:
            subject = Subject(graph, graph.lower(place, hidden), seed, torch.device(device))
        except BlueprintError as error:
            yield Check("fits", where, False, str(error))
            continue
        yield Check("fits", where, True, f"{subject.program.parameter_count()} parameters")
        for name, demand in DEMANDS.items():
            if demands is None or name in demands:
                yield _held(name, where, demand, subject)


def _held(
    name: str, where: str, demand: Callable[[Subject], tuple[bool | None, str]], subject: Subject
) -> Check:
    """Run one demand from the same random state each time, and leave the caller's alone."""
    with torch.random.fork_rng():
        torch.manual_seed(subject.seed)
        try:
            passed, detail = demand(subject)
        except RAISED as error:
            passed, detail = False, f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
    return Check(name, where, passed, detail)
