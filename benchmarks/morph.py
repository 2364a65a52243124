"""How long do a seed's own steps take: waking, culling, widening, and one call while it is awake?"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from benchmarks import compare, harness, machine
from benchmarks.promises import Promise
from esper.blueprints.kernel import LiveKernel
from esper.contracts import Decision, Stage
from esper.kasmina.branches.fold import merged, write
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.race.survey import Measured, measure
from esper.kasmina.race.trial import Baseline, Germinated, Origin
from esper.kasmina.seeds.layer import KasminaLayer
from esper.kasmina.widths.places import Place
from esper.tolaria.growth import Growth

NAME = "morph"
REPEATS = 60  # of every row; a widening needs a new host each time
UNITS = 8
CALLS = 300  # in one sample of dispatch, whose calls are too short to be timed one by one
POOL = 32
GERMINATE = "germinate: seam, kernel, state"
CULL = "cull"
WIDEN = "widen in place: parameters, optimizer, sites"
DISPATCH = "awake dispatch, µs over the bare site"
INFERENCE = "awake dispatch without gradients, µs"
PROMISED = {GERMINATE: 1.0, CULL: 0.1, WIDEN: 5.0, DISPATCH: 6.0}
ROWS = {
    GERMINATE: "a live kernel built at a site, both seams opened, the seed moved to TRAINING",
    "germinate as a decision does": "the same with a race: eight candidates built, stacked, fitted and told",
    CULL: "a woken seed culled: outcome told, seams closed, state cleared, the site embargoed",
    "cull, right after": "the same of a decision's seed and its race, whose making has cleared the caches",
    WIDEN: "the host's tensors and the optimizer's state enlarged, every site's facts renewed",
    "widen, checked": "the same with two passes over the probe, before and after, and what is told",
    "graft: kernel becomes a branch": "a low_rank kernel registered under the host, adopted by the optimizer",
    "merge: kernel folded into its layer": "its matrix read off and added to the Linear it stands at",
    "unwrap": "the seams of the awake seed closed and the host given back",
    DISPATCH: "a call whose kernel returns its input: seam, kernel's call, finite check, blend",
    INFERENCE: "the same under no_grad",
}


@dataclass(frozen=True)
class Subject:
    """A host, what it is called with, and a place to widen and one for a branch."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    pair: str
    branch: str


class Perceptron(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


class Convolutional(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            nn.Linear(64, 10),
        )


class Transformer(nn.Module):
    """Two pre-norm blocks and a mean over positions."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, width), nn.Linear(width, 10)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, 8) -> (batch, 10)
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.act, self.down = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.project(F.scaled_dot_product_attention(q, k, v))
        return x + self.down(self.act(self.up(self.norm2(x))))


SUBJECTS = (
    Subject("MLP", Perceptron, lambda: torch.randn(64, 64), "0>2", "0+low_rank"),
    Subject("CNN", Convolutional, lambda: torch.randn(64, 1, 8, 8), "0>4", "8+low_rank"),
    Subject(
        "transformer",
        Transformer,
        lambda: torch.randn(32, 16, 8),
        "blocks.0.up>blocks.0.down",
        "blocks.0.up+low_rank",
    ),
)


@dataclass
class Bed:
    """A run on a host, ready to have its parts timed one at a time."""

    growth: Growth
    model: MorphableModel
    optimizer: torch.optim.Optimizer
    subject: Subject
    measured: dict[str, Measured] = field(default_factory=dict)

    @classmethod
    def made(cls, subject: Subject, *blueprints: str) -> Bed:
        torch.manual_seed(0)
        host, x = subject.build(), subject.batch()
        batch = x, torch.randint(10, (len(x),))
        optimizer = torch.optim.Adam(host.parameters(), lr=1e-3)
        config = {"blueprints": blueprints} if blueprints else None
        growth = esper.grow(
            host, optimizer, loss_fn, probe=[batch], steps=1000, growth="incubate", config=config
        )
        loss_fn(host, batch).backward()
        optimizer.step()
        bed = cls(growth, growth.run.morphable, optimizer, subject)
        if not blueprints:
            runs = [lambda: loss_fn(host, batch)]
            bed.measured = measure(bed.model, [subject.pair], runs, 0, POOL, len(x))
        return bed

    def decision(self, site: str) -> Decision:
        number = self.growth.run.tamiyo.decisions = self.growth.run.tamiyo.decisions + 1
        return Decision(number, 0, "widen", site, UNITS, "mixed", "asked for", 1.0, None)

    def wake(self, site: str) -> KasminaLayer:
        """Wake a seed: what stands between a decision and a kernel at work, without a race."""
        layout, seed = self.model.layout, self.model.seeds(site)[0]
        layer = self.model.layer(site, print)
        layout.move(seed, Stage.DORMANT, Stage.GERMINATED, 0)
        layer.kernel = layer.place.kernel(UNITS).train()
        layer.alpha = layout.alpha[seed]
        layout.move(seed, Stage.GERMINATED, Stage.TRAINING, 0)
        return layer

    def sleep(self, site: str) -> None:
        self.model.release(site)
        self.model.layout.clear(self.model.seeds(site)[0])
        self.model.layout.stage.zero_()


class Stopwatch:
    """CPU milliseconds of this thread, by row."""

    def __init__(self) -> None:
        self.rows: dict[str, list[float]] = defaultdict(list)

    def time(self, row: str, call: Callable[[], Any]) -> Any:
        begun = time.thread_time_ns()
        result = call()
        self.rows[row].append((time.thread_time_ns() - begun) / 1e6)
        return result


def main(argv: Sequence[str]) -> int:
    """Time every row on every host: CPU time of the thread, median of many repeats."""
    chosen = harness.options(NAME, __doc__, argv, seeds=REPEATS)
    torch.set_num_threads(machine.THREADS_PER_WORKER)
    repeats = chosen.seeds
    rows = {subject.name: measured(subject, repeats) for subject in SUBJECTS}
    rows["one site"] = dispatch(repeats)
    medians = {name: {row: statistics.median(v) for row, v in by.items()} for name, by in rows.items()}
    table = compare.titled(
        f"Milliseconds of CPU time, median of {repeats} (95th percentile); dispatch in µs",
        ["what", *medians, "promised"],
    )
    for row, meaning in ROWS.items():
        cells = [show(by[row]) if row in by else "–" for by in rows.values()]
        table.add_row(f"{row}\n  [dim]{meaning}[/]", *cells, f"{PROMISED[row]:g}" if row in PROMISED else "–")
    judged = [
        Promise(f"{row}, p50, slowest host", worst(medians, row), "<=", bound, digits=3)
        for row, bound in PROMISED.items()
    ]
    return harness.conclude(
        NAME, chosen, [table], judged, {"medians": medians, "rows": rows, "meaning": ROWS}
    )


def measured(subject: Subject, repeats: int) -> dict[str, list[float]]:
    """Time every row that this host has."""
    watch = Stopwatch()
    lives(Bed.made(subject), watch, repeats)
    for _ in range(repeats):
        widening(Bed.made(subject), watch)
    for _ in range(repeats):
        grafting(Bed.made(subject, "low_rank"), watch)
    return watch.rows


def lives(bed: Bed, watch: Stopwatch, repeats: int) -> None:
    """Wake and cull over and over."""
    site, orchestrator = bed.subject.pair, bed.growth.run.orchestrator
    for _ in range(repeats):
        watch.time(GERMINATE, lambda: bed.wake(site))
        watch.time("unwrap", lambda: esper.unwrap(bed.model))
        bed.sleep(site)
        decision = bed.decision(site)
        watch.time(
            "germinate as a decision does", partial(orchestrator.germinate, decision, bed.measured[site], 0)
        )
        watch.time("cull, right after", lambda: orchestrator.cull(orchestrator.oldest, "asked for"))
        bed.sleep(site)
        seed = bed.model.seeds(site)[0]
        baseline = Baseline(0, bed.model.parameter_count(), bed.model.flops)
        germinated = orchestrator.put(
            Germinated(Origin(decision, site, 0, seed, bed.wake(site), baseline), 0)
        )
        watch.time(CULL, partial(orchestrator.cull, germinated, "asked for"))
        bed.sleep(site)


def widening(bed: Bed, watch: Stopwatch) -> None:
    """Make a kernel part of its pair, first the surgery alone and then as a run does."""
    committer, site = bed.growth.run.parts.committer, bed.subject.pair
    own = torch.optim.Adam(bed.wake(site).kernel.parameters())  # type: ignore[union-attr]
    trained(bed, site, own)
    kernel: Any = bed.model.awake(site).kernel  # type: ignore[union-attr]
    plan = kernel.plan()

    def surgery() -> None:
        committer.carry_out(plan, kernel.slices(plan), {}, None, 0)
        bed.model.refresh(committer.run)

    watch.time(WIDEN, surgery)
    bed.sleep(site)
    own = torch.optim.Adam(bed.wake(site).kernel.parameters())  # type: ignore[union-attr]
    trained(bed, site, own)
    kernel = bed.model.awake(site).kernel  # type: ignore[union-attr]
    why = watch.time("widen, checked", lambda: committer.commit(kernel, own, bed.decision(site), 0))
    if why:
        raise RuntimeError(why)


def grafting(bed: Bed, watch: Stopwatch) -> None:
    """Make a blueprint's kernel a branch, and fold another one into its layer."""
    committer, site = bed.growth.run.parts.committer, bed.subject.branch
    layer = bed.wake(site)
    kernel: Any = layer.kernel
    own = torch.optim.Adam(kernel.parameters())
    trained(bed, site, own)
    place: Any = layer.place
    watch.time("merge: kernel folded into its layer", lambda: write_back(place, kernel))
    plan = committer.plan_for(place, UNITS)
    watch.time("graft: kernel becomes a branch", lambda: committer.attach(plan, kernel, own, None))


def write_back(place: Place, kernel: Any) -> None:
    found = merged(place, kernel)  # type: ignore[arg-type]
    if found is None:
        raise RuntimeError(f"{place.site.name} cannot be merged")
    write(place.ends()[0], *found)  # type: ignore[arg-type]


def trained(bed: Bed, site: str, own: torch.optim.Optimizer) -> None:
    """Expose a kernel and step its optimizer, so that there is state to be enlarged or adopted."""
    layer = bed.model.awake(site)
    assert layer is not None
    bed.model.layout.alpha.fill_(1.0)
    layer.exposed = True
    bed.growth.run.parts.committer.run().backward()
    own.step()
    bed.optimizer.step()


class Echo(LiveKernel):
    """A kernel that computes nothing: what a call costs beside it is dispatch."""

    outgoing = ()
    axes: Mapping[str, int] = {}

    def forward(self, x: Tensor) -> Tensor:
        return x


def dispatch(repeats: int) -> dict[str, list[float]]:
    """Call a site bare and awake in turns; the difference is seam, kernel's call, finite check and blend.

    The site is a Linear of 8 units, so that arithmetic does not hide it.
    """
    rows: dict[str, list[float]] = {DISPATCH: [], INFERENCE: []}
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    x, site = torch.randn(4, 8), "2+low_rank"
    model = esper.wrap(host, x, blueprints=("low_rank",))
    bare, awake = copy.deepcopy(host[2]), host[2]
    layer = model.layer(site, print)
    layer.kernel, layer.alpha, layer.exposed = Echo(), model.layout.alpha[0], True
    model.layout.alpha[0] = 0.5
    for _ in range(repeats):
        for row, grad in ((DISPATCH, True), (INFERENCE, False)):
            with torch.set_grad_enabled(grad):
                alone, together = microseconds(bare, x), microseconds(awake, x)
            rows[row].append(together - alone)
    return rows


def microseconds(call: Callable[[Tensor], Tensor], x: Tensor) -> float:
    begun = time.thread_time_ns()
    for _ in range(CALLS):
        call(x)
    return (time.thread_time_ns() - begun) / 1e3 / CALLS


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def worst(medians: dict[str, dict[str, float]], row: str) -> float | None:
    return max((by[row] for by in medians.values() if row in by), default=None)


def show(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({sorted(values)[int(0.95 * (len(values) - 1))]:.3f})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
