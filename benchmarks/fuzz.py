"""Does every valid graph build, match eager and train, and is every invalid one refused by name?"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

from benchmarks import compare, harness
from benchmarks.promises import Promise
from benchmarks.workers import workers
from esper.blueprints.graph import Graph
from esper.blueprints.sizes import example_shapes
from esper.errors import BlueprintError
from esper.testing.demands import Subject
from esper.testing.graphs import Fitting, Spoilt, nonsense, spoilt_graphs, valid_graphs
from esper.tezzeret.pipelines import PIPELINES

NAME = "fuzz"
SEEDS = 10
VALID, SPOILT, NONSENSE = 620, 300, 100  # graphs per seed
QUICK = 10  # a quick run draws so many times fewer
CLOSE = 1e-9  # float64, relative to the largest value
STEPS = 2


@dataclass
class Tally:
    """What one seed's graphs came to."""

    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def main(argv: Sequence[str]) -> int:
    """Draw a thousand graphs per seed; a failure is shrunk to the smallest graph that shows it."""
    chosen = harness.options(NAME, __doc__, argv, seeds=SEEDS)
    share = QUICK if chosen.quick else 1
    with workers(chosen.jobs) as pool:
        tallies: list[Tally] = pool.map(partial(run_seed, share=share), range(chosen.seeds), NAME)
    counts: Counter[str] = sum((tally.counts for tally in tallies), Counter())
    operators: Counter[str] = sum((tally.operators for tally in tallies), Counter())
    failures = [failure for tally in tallies for failure in tally.failures]
    table = compare.titled(f"Random graphs, {chosen.seeds} seeds", ["what", "graphs"])
    for name, count in sorted(counts.items()):
        table.add_row(name, str(count))
    shown = [table, *failures]
    drawn = counts["valid"] + counts["spoilt"] + counts["nonsense"]
    judged = [
        Promise("random graphs", drawn, ">=", 10_000, digits=0),
        Promise(
            "valid: built, run as TorchScript as eager, and trained",
            counts["sound"] / max(counts["valid"], 1),
            ">=",
            1.0,
            digits=4,
        ),
        Promise(
            "spoilt: refused with the node and the reason",
            counts["refused by name"] / max(counts["spoilt"], 1),
            ">=",
            1.0,
            digits=4,
        ),
        Promise("crashes", len(failures), "<=", 0, digits=0),
    ]
    figures = {"counts": dict(counts), "operators": dict(operators), "failures": failures}
    return harness.conclude(NAME, chosen, shown, judged, figures)


def run_seed(seed: int, share: int = 1) -> Tally:
    """Draw one seed's graphs of every kind."""
    tally = Tally(seed)
    kinds: list[tuple[int, SearchStrategy, Callable]] = [
        (VALID, valid_graphs(), valid),
        (SPOILT, spoilt_graphs(), spoilt),
        (NONSENSE, nonsense(), nonsensical),
    ]
    for count, strategy, judge in kinds:
        explore(tally, count // share, strategy, judge)
    return tally


def explore(tally: Tally, count: int, strategy: SearchStrategy, judge: Callable) -> None:
    """Judge so many graphs of one kind; the first that fails ends it, shrunk."""
    rules = settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )

    @hypothesis.seed(tally.seed)
    @rules
    @given(strategy)
    def trial(drawn: Any) -> None:
        judge(tally, drawn)

    try:
        trial()
    except Exception as error:  # a crash is what this bench counts, whatever its kind
        notes = " ".join(getattr(error, "__notes__", ()))
        tally.failures.append(f"seed {tally.seed}: {type(error).__name__}: {error} {notes}"[:2000])


def valid(tally: Tally, fitting: Fitting) -> None:
    """Build, keep, run and train one valid graph."""
    tally.counts["valid"] += 1
    graph = fitting.graph
    tally.operators.update(node.op for node in graph.nodes)
    assert Graph.from_json(graph.to_json()).digest() == graph.digest()
    program = graph.lower(fitting.signature, fitting.hidden)
    subject = Subject(graph, program, 0, torch.device("cpu"))
    x = torch.randn(example_shapes(fitting.signature)[1][0], dtype=torch.float64)
    newborn = subject.newborn(torch.float64)
    grown = subject.grown(torch.float64)
    expected = grown(x)
    assert tuple(expected.shape) == example_shapes(fitting.signature)[1][1]
    if not expected.isfinite().all():
        tally.counts["overflow"] += 1  # products of products: still no crash, nothing to compare
    elif not newborn(x).any():
        match(grown.program.run, program, x, [p.detach() for p in grown.parameters()])
        train(newborn, x)
    else:
        raise AssertionError("not zero at birth")
    tally.counts["sound"] += 1


def match(run: Callable, program: object, x: Tensor, weights: list[Tensor]) -> None:
    """Hold TorchScript against eager, twice: its second call runs other code than its first."""
    pipeline = PIPELINES.get("torchscript")
    form = pipeline.compile(program, x)
    exact = run(x, weights)
    for _ in range(2):
        found = form(x, weights)
        apart = float((found - exact).abs().max() / exact.abs().max().clamp_min(1e-30))
        assert apart <= CLOSE, f"TorchScript is {apart:.2g} off"


def train(kernel: nn.Module, x: Tensor) -> None:
    """Take a few bounded steps towards a random target."""
    optimizer = torch.optim.SGD(kernel.parameters(), 0.01)
    target = torch.randn_like(kernel(x))
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(kernel(x), target)
        loss.backward()
        nn.utils.clip_grad_norm_(kernel.parameters(), 1.0)
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in kernel.parameters()), "training diverged"


def spoilt(tally: Tally, one: Spoilt) -> None:
    """Refuse one spoilt graph with the node to blame and the reason."""
    tally.counts["spoilt"] += 1
    said = refusal(one)
    assert said is not None, f"accepted though spoilt: {one}"
    assert one.reason in said, f"{said} does not say {one.reason!r}"
    assert one.node is None or repr(one.node) in said, f"{said} does not name {one.node!r}"
    tally.counts["refused by name"] += 1


def refusal(one: Spoilt) -> str | None:
    """Return what is said of a spoilt graph, None if nothing is."""
    try:
        Graph.from_json(one.text).lower(one.signature, one.hidden)
    except BlueprintError as error:
        return str(error)
    return None


def nonsensical(tally: Tally, text: str) -> None:
    """Refuse nonsense with one kind of error; by luck it may be a graph."""
    tally.counts["nonsense"] += 1
    with contextlib.suppress(BlueprintError):
        Graph.from_json(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
