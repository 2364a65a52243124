"""Does memory stay what the model needs after hundreds of wakings, cullings and widenings?"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.text import Text
from torch import Tensor, nn

import esper
from benchmarks import compare, harness, machine
from benchmarks.promises import Promise
from esper.blueprints.kernel import LiveKernel
from esper.contracts import Decision
from esper.kasmina.race.race import Race
from esper.kasmina.race.survey import measure
from esper.kasmina.race.trial import Training
from esper.kasmina.seeds.layer import KasminaLayer
from esper.tolaria.growth import Growth

NAME = "fragmentation"
REPEATS = 1
CYCLES, WIDENINGS = 200, 20
WARM, WARM_WIDENINGS = 20, 3  # before the first reading: a widening holds the old and the new tensors at once
WIDTH, UNITS = 1024, 32  # of the MLP, and added at a time: 4 MiB a layer
ALLOWED = 0.05  # of what the process held, beyond the parameters and optimizer state that were added
MIB = 2**20


def main(argv: Sequence[str]) -> int:
    """Read the process's memory before and after cycles, a training step in each.

    A cycle germinates a seed with a race of eight candidates, gives it one lesson and culls it; a widening
    enlarges the host in place. On CUDA the share of reserved memory that is not allocated is read as well;
    on the CPU there is no such allocator, and nothing is said of its fragmentation.
    """
    chosen = harness.options(NAME, __doc__, argv, seeds=REPEATS)
    torch.set_num_threads(machine.THREADS_PER_WORKER)
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    warm, cycles, widenings = (2, 5, 2) if chosen.quick else (WARM, CYCLES, WIDENINGS)
    bench = Cycles(device, 64 if chosen.quick else WIDTH)
    bench.repeat(bench.cycle, warm)
    bench.repeat(bench.widen, 2 if chosen.quick else WARM_WIDENINGS)
    readings = [bench.read("start")]
    bench.repeat(bench.cycle, cycles)
    readings.append(bench.read(f"{cycles} germinations and culls"))
    bench.repeat(bench.widen, widenings)
    readings.append(bench.read(f"{widenings} widenings"))
    bench.growth.finish()
    readings.append(bench.read("finished"))

    columns = ["after", "RSS, MiB", "host and optimizer, MiB", "kernels", "layers", "races"]
    table = compare.titled(
        f"Memory on {device}", [*columns, *(["allocated, MiB", "reserved, MiB"] if cuda else [])]
    )
    for one in readings:
        figures = (one["rss"] / MIB, one["held"] / MIB)
        extra = [f"{one[k] / MIB:.1f}" for k in ("allocated", "reserved")] if cuda else []
        counts = (str(one[kind]) for kind in ("kernels", "layers", "races"))
        table.add_row(one["after"], *(f"{figure:.1f}" for figure in figures), *counts, *extra)
    said = Text("" if cuda else "allocator fragmentation is a notion of CUDA's and was not measured")
    start, culled, widened, end = readings
    judged = [
        Promise("RSS after the culls over before", culled["rss"] / start["rss"], "<=", 1 + ALLOWED, digits=3),
        Promise(
            "RSS after the widenings, less what was added, over before",
            (widened["rss"] - max(widened["held"] - start["held"], 0)) / start["rss"],
            "<=",
            1 + ALLOWED,
            digits=3,
        ),
        Promise("live kernels, layers and races at the end", leaked(end), "<=", 0, digits=0),
    ]
    if cuda:
        text = "reserved memory that is not allocated, share more than before"
        judged.append(Promise(text, loose(widened) - loose(start), "<=", ALLOWED, digits=3))
    return harness.conclude(NAME, chosen, [table, said], judged, {"device": device, "readings": readings})


class Cycles:
    """A run whose decisions are made by hand."""

    def __init__(self, device: str, width: int) -> None:
        torch.manual_seed(0)
        host = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        host.append(nn.Linear(width, 10))
        self.host = host.to(device)
        self.batch = torch.randn(64, width, device=device), torch.randint(10, (64,), device=device)
        self.optimizer = torch.optim.Adam(host.parameters(), lr=1e-3)
        config = {"schedule": {"warmup": 0.9, "plateau": False}}
        probe, steps = [self.batch], 10**6
        self.growth: Growth = esper.grow(
            host, self.optimizer, loss_fn, probe=probe, steps=steps, growth="incubate", config=config
        )
        self.site = next(iter(self.growth.run.morphable.places))
        self.number = 0

    def train(self) -> None:
        self.optimizer.zero_grad()
        loss_fn(self.host, self.batch).backward()
        self.optimizer.step()

    def repeat(self, what: Callable[[], None], times: int) -> None:
        for _ in range(times):
            self.train()
            what()
        self.train()

    def decision(self) -> Decision:
        self.number += 1
        return Decision(self.number, 0, "widen", self.site, UNITS, "mixed", "asked for", 1.0, None)

    def cycle(self) -> None:
        """Survey, germinate with a race, give it a lesson, cull."""
        orchestrator, model = self.growth.run.orchestrator, self.growth.run.morphable
        run = lambda: loss_fn(self.host, self.batch)  # noqa: E731
        found = measure(model, [self.site], [run], self.number, 32, 64)
        orchestrator.germinate(self.decision(), found[self.site], 0)
        trial = orchestrator.oldest
        assert isinstance(trial, Training)
        trial.race.learn_from_shadow(run)
        orchestrator.cull(trial, "asked for")
        model.layout.stage.zero_()  # no cool-down

    def widen(self) -> None:
        """Wake a seed, step its optimizer once and make it part of the host."""
        growth, model = self.growth, self.growth.run.morphable
        layer = model.layer(self.site, print)
        kernel: Any = layer.place.kernel(UNITS).train()
        decision = self.decision()
        layer.kernel, layer.alpha, layer.exposed = kernel, model.layout.alpha[0], True
        model.layout.alpha[0] = 1.0
        own = torch.optim.Adam(kernel.parameters(), lr=1e-3)
        loss_fn(self.host, self.batch).backward()
        own.step()
        why = growth.run.parts.committer.commit(kernel, own, decision, 0)
        if why:
            raise RuntimeError(why)
        model.release(self.site)
        model.layout.clear(0)

    def read(self, after: str) -> dict[str, Any]:
        """Read the memory, and count what must not outlive its seed."""
        gc.collect()
        alive = gc.get_objects()
        counts = {
            name: sum(issubclass(type(one), kind) for one in alive)  # isinstance would ask lazy modules
            for name, kind in (("kernels", LiveKernel), ("layers", KasminaLayer), ("races", Race))
        }
        del alive
        found: dict[str, Any] = {"after": after, "rss": resident(), "held": self.held(), **counts}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            found |= {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
        return found

    def held(self) -> int:
        """Count the bytes of parameters, gradients and optimizer state."""
        tensors: list[Tensor] = [*self.host.parameters()]
        tensors += [p.grad for p in self.host.parameters() if p.grad is not None]
        tensors += [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        return sum(tensor.nbytes for tensor in tensors)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def resident() -> int:
    """Return the bytes of memory this process holds; Linux tells it in /proc."""
    with open("/proc/self/status", encoding="ascii") as lines:
        line = next(line for line in lines if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def leaked(reading: dict[str, Any]) -> int:
    return sum(reading[kind] for kind in ("kernels", "layers", "races"))


def loose(reading: dict[str, Any]) -> float:
    return 1 - reading["allocated"] / max(reading["reserved"], 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
