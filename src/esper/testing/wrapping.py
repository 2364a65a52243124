"""The wrapping suite: what must hold of whatever stands around a model that many processes train.

All processes of a group call it together. What a wrapping does is seen from outside, by the losses of the
wrapped model: a part that is lost, or averaged no more, shows in them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from threading import enumerate as threads
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from esper.contracts import WidenEdit, WidenPlan
from esper.distributed.group import Group
from esper.distributed.model_wrapper import Wrapping
from esper.errors import EsperError, SurgeryError
from esper.surgery.optimizers.widening import widen_state
from esper.surgery.widen_layers import widen
from esper.testing.blueprint import RAISED

INPUTS, HIDDEN, OUTPUTS = 5, 7, 3  # odd, so that no part of a tensor is as large as another
BATCH, STEPS, AT = 4, 6, 3  # rows in each process; steps of a run; the step before which something is done
CLOSE = 1e-9  # float64, absolute: means of two halves against the mean of the whole
DEADLINE = 30.0  # seconds to wait for another process

Module = TypeVar("Module", bound=nn.Module)
Wrap = Callable[[nn.Module], nn.Module]
Make = Callable[[nn.Module, float], Wrapping]


class Host(nn.Module):
    """Two layers, and a third beside them that may come later."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, OUTPUTS)
        self.beside: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x`` (batch, inputs) to (batch, outputs)."""
        y = self.down(torch.tanh(self.up(x)))
        return y if self.beside is None else y + self.beside(x)


@dataclass
class Run:
    """One model that trains: wrapped, or, without ``wrap``, in this process alone on everybody's rows."""

    wrap: Wrap | None = None
    make: Make | None = None
    losses: list[float] = field(default_factory=list)  # one a step, of the same rows in every process

    def __post_init__(self) -> None:
        self.host = seeded(Host)
        self.model = self.host if self.wrap is None else self.wrap(self.host)
        self.wrapping = Wrapping(self.model) if self.make is None else self.make(self.model, DEADLINE)
        self.optimizers: dict[str, Optimizer] = {"main": AdamW(self.model.parameters(), lr=0.05)}

    def step(self) -> None:
        """Train on this process's rows, alone on those of all."""
        ranks = range(dist.get_world_size()) if self.wrap is None else [dist.get_rank()]
        parts = [rows(1 + rank, len(self.losses)) for rank in ranks]
        x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))  # (rows, inputs), (rows, outputs)
        nn.functional.mse_loss(self.model(x), y).backward()
        self.optimizers["main"].step()
        self.optimizers["main"].zero_grad()
        with torch.no_grad():
            x, y = rows(0, 0)
            self.losses.append(nn.functional.mse_loss(self.model(x), y).item())

    def run(self, act: Callable[[Run], None] = lambda run: None) -> list[float]:
        """Train to the end, act on the way, and let go; return the losses."""
        for number in range(STEPS):
            if number == AT:
                act(self)
            self.step()
        self.wrapping.close()
        return self.losses


@dataclass(frozen=True)
class Ground:
    """A kind of wrapping, as the demands try it."""

    wrap: Wrap
    make: Make

    def run(self, act: Callable[[Run], None] = lambda run: None) -> list[float]:
        """Return the losses of a wrapped run."""
        return Run(self.wrap, self.make).run(act)

    def as_alone(self, act: Callable[[Run], None] = lambda run: None) -> bool:
        """Whether a wrapped run comes to what one process comes to on the rows of all."""
        return max(abs(a - b) for a, b in zip(self.run(act), Run().run(act), strict=True)) <= CLOSE


def check_wrapping(wrap: Wrap, make: Make) -> list[tuple[str, bool]]:
    """Hold a wrapping to every demand of its contract; all processes of the default group call it.

    Args:
        wrap: Function that wraps a module as a user would.
        make: Function that returns the wrapping of what ``wrap`` returned, given the seconds to wait.

    Returns:
        Each demand, and whether it holds in every process.
    """
    group, ground = Group(None, DEADLINE), Ground(wrap, make)
    return [
        (name.replace("_", " "), group.all_ranks(_held(demand, ground))) for name, demand in DEMANDS.items()
    ]


def the_peers_are_all_that_train_it(ground: Ground) -> bool:
    """``peers`` are the processes of the group, by their ranks."""
    wrapping = Run(ground.wrap, ground.make).wrapping
    rank, world = dist.get_rank(), dist.get_world_size()
    found = wrapping.peers.all_gather_ints([wrapping.peers.rank, wrapping.peers.world])
    wrapping.close()
    return wrapping.peers.rank == rank and found == [[one, world] for one in range(world)]


def it_trains_as_one_process_would(ground: Ground) -> bool:
    """Wrapped, gradients are the mean over all processes' rows."""
    return ground.as_alone()


def gathered_is_an_ordinary_module(ground: Ground) -> bool:
    """While it is gathered, one process may run the host and differentiate it, without the others."""
    slopes: list[list[Tensor]] = []

    def look(run: Run) -> None:
        with run.wrapping.gathered():
            if dist.get_rank() == 0:
                x, y = rows(1, 99)
                own = [*run.wrapping.host.parameters()]
                slopes.append([*torch.autograd.grad(nn.functional.mse_loss(run.wrapping.host(x), y), own)])

    as_never = ground.run(look) == ground.run()
    Run().run(look)  # alone, on the same rows
    pairs = zip(*slopes, strict=True)  # of one parameter each; none in the other processes
    return as_never and all(torch.allclose(a, b, atol=CLOSE) for a, b in pairs)


def plain_holds_whole_tensors(ground: Ground) -> bool:
    """While it is plain, parameters and states are whole, and the optimizers hold what the host has."""
    found: list[bool] = []

    def look(run: Run) -> None:
        with run.wrapping.plain(run.optimizers):
            own = [*run.wrapping.host.parameters()]
            shapes = [parameter.shape for parameter in Host().parameters()]
            held = [one for group in run.optimizers["main"].param_groups for one in group["params"]]
            states = [run.optimizers["main"].state[parameter]["exp_avg"] for parameter in own]
            found.append(
                all(type(one) is nn.Parameter for one in own)
                and [one.shape for one in own] == [one.shape for one in states] == shapes
                and {*map(id, own)} == {*map(id, held)}
            )

    return ground.run(look) == ground.run() and all(found)


def layers_become_wider(ground: Ground) -> bool:
    """While it is reshaping, layers and optimizer states grow; the user's variable goes on training them."""
    return ground.as_alone(lambda run: reshaped(run, wider))


def new_parameters_are_trained_by_all(ground: Ground) -> bool:
    """While it is reshaping, a layer may come; from then on its gradient is averaged too."""
    return ground.as_alone(lambda run: reshaped(run, joined))


def a_reshaping_that_fails_leaves_it_training(ground: Ground) -> bool:
    """An error inside passes through, and nothing is lost."""
    passed: list[bool] = []

    def fail(run: Run) -> None:
        try:
            with run.wrapping.reshaping(run.optimizers):
                raise SurgeryError("what was to change it failed")
        except SurgeryError:
            passed.append(True)

    return ground.run(fail) == ground.run() and passed == [True]


def hooks_of_the_user_stay(ground: Ground) -> bool:
    """A hook on what the loop calls is called after a reshaping as before."""
    called: list[bool] = []

    def hook(run: Run) -> None:
        run.model.register_forward_hook(lambda *_: called.append(True))
        with run.wrapping.reshaping(run.optimizers):
            pass

    ground.run(hook)
    return len(called) == 2 * (STEPS - AT)


def closing_lets_go(ground: Ground) -> bool:
    """No thread is left of it."""
    before = {*threads()}
    Run(ground.wrap, ground.make).wrapping.close()
    return {*threads()} <= before


DEMANDS: dict[str, Callable[[Ground], bool]] = {
    demand.__name__: demand
    for demand in (
        the_peers_are_all_that_train_it,
        it_trains_as_one_process_would,
        gathered_is_an_ordinary_module,
        plain_holds_whole_tensors,
        layers_become_wider,
        new_parameters_are_trained_by_all,
        a_reshaping_that_fails_leaves_it_training,
        hooks_of_the_user_stay,
        closing_lets_go,
    )
}


def _held(demand: Callable[[Ground], bool], ground: Ground) -> bool:
    try:
        return demand(ground)
    except (EsperError, *RAISED):
        return False


def seeded(make: Callable[[], Module], seed: int = 0) -> Module:
    """Make a module in float64, the same one everywhere, and leave the caller's random state alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().double()


def rows(stream: int, number: int) -> tuple[Tensor, Tensor]:
    """Draw a batch: inputs (batch, inputs), targets (batch, outputs)."""
    generator = torch.Generator().manual_seed(1000 * number + stream)
    shapes = (BATCH, INPUTS), (BATCH, OUTPUTS)
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x, y


def reshaped(run: Run, change: Callable[[Run], None]) -> None:
    """Change the host's shape, where something stands around it within ``reshaping``."""
    with nullcontext() if run.make is None else run.wrapping.reshaping(run.optimizers):
        change(run)


def wider(run: Run) -> None:
    """Give the hidden layer two units more."""
    new = HIDDEN + 2
    edits = [WidenEdit(f"up.{leaf}", 0, HIDDEN, new, "") for leaf in ("weight", "bias")]
    edits.append(WidenEdit("down.weight", 1, HIDDEN, new, ""))
    plan = WidenPlan("up>down", 2, tuple(edits), (("up", "out_features", new), ("down", "in_features", new)))
    donor = seeded(lambda: nn.Linear(INPUTS, 2), seed=1)
    slices = {"up.weight": donor.weight.detach(), "up.bias": donor.bias.detach()}
    slices["down.weight"] = torch.full((OUTPUTS, 2), 0.1, dtype=torch.float64)
    widen_state(run.optimizers, widen(run.wrapping.host, plan, slices).changes)


def joined(run: Run) -> None:
    """Put a third layer beside the two."""
    layer = seeded(lambda: nn.Linear(INPUTS, OUTPUTS), seed=2)
    run.wrapping.host.beside = layer
    run.optimizers["main"].add_param_group({"params": [*layer.parameters()]})
