"""What a look that is under way must remember to go on in another process: sums, picks, values so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypedDict

from torch import Tensor

from esper.blueprints.kernel import LiveKernel
from esper.contracts import HealthReport
from esper.kasmina.depth.stack import DepthKernel
from esper.kasmina.evidence.efficient import Move, Sums
from esper.kasmina.evidence.score import Score, Scored, pool_size
from esper.kasmina.evidence.sight import judged
from esper.surgery.isolation.contexts import same_randomness


class ChosenState(TypedDict):
    """What was picked at one place."""

    report: dict[str, Any]
    kernel: dict[str, Tensor] | None  # None: the pool itself
    direction: dict[str, Tensor]
    moves: list[list[Any]]  # (new, own) of each


class ScoreState(TypedDict):
    """What a look remembers, by place."""

    pools: dict[str, dict[str, Tensor]]
    sums: dict[str, list[dict[str, Any]]]
    chosen: dict[str, ChosenState]
    found: dict[str, list[Tensor]]
    seen: dict[str, dict[str, Any]]
    failed: dict[str, str]
    flops: int


def written(score: Score) -> ScoreState:
    """Return a look's state: tensors, numbers, strings and containers of them."""
    return {
        "pools": {name: dict(pool.state_dict()) for name, pool in score.pools.items()},
        "sums": {
            name: [{fact: getattr(one, fact) for fact in Sums.__slots__} for one in parts]
            for name, parts in score.sums.items()
        },
        "chosen": {name: chosen(score, name, one) for name, one in score.chosen.items()},
        "found": {name: list(parts) for name, parts in score.found.items()},
        "seen": {name: dict(facts) for name, facts in score.seen.items()},
        "failed": dict(score.failed),
        "flops": score.flops,
    }


def chosen(score: Score, name: str, one: Scored) -> ChosenState:
    """Return what was picked at one place; None for a kernel that is the pool itself."""
    own = one.kernel is not score.pools.get(name)
    return {
        "report": asdict(one.report),
        "kernel": dict(one.kernel.state_dict()) if own else None,
        "direction": dict(one.direction),
        "moves": [[move.new, move.own] for move in one.moves],
    }


def read_back(score: Score, state: ScoreState) -> None:
    """Bring a fresh look at the same places to a saved state."""
    with same_randomness(0):
        for name, tensors in state["pools"].items():
            score.pools[name] = filled(score, name, pool_size(score.places[name], score.units[name]), tensors)
        for name, one in state["chosen"].items():
            own = one["kernel"]
            kernel = score.pools[name] if own is None else filled(score, name, score.units[name], own)
            moves = tuple(Move(new, steps) for new, steps in one["moves"])
            report = HealthReport(**one["report"])
            score.chosen[name] = Scored(report, kernel, dict(one["direction"]), moves)
    score.sums = {name: [Sums(**one) for one in parts] for name, parts in state["sums"].items()}
    score.found = {name: list(parts) for name, parts in state["found"].items()}
    score.seen = {name: dict(facts) for name, facts in state["seen"].items()}
    score.failed, score.flops = dict(state["failed"]), state["flops"]


def filled(score: Score, name: str, units: int, tensors: Mapping[str, Tensor]) -> LiveKernel:
    """Build a kernel and give it its weights."""
    kernel = score.places[name].kernel(units)
    if isinstance(kernel, DepthKernel):
        judged(kernel)
    kernel.load_state_dict(dict(tensors))
    return kernel
