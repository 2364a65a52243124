"""A stack as a place to grow: where one more block comes, what it is at birth, and what it adds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from esper.blueprints.kernel import LiveKernel
from esper.contracts import DeepenPlan, Site
from esper.kasmina.depth.birth import Scale, born
from esper.kasmina.depth.counts import counts_of
from esper.kasmina.recording.recorder import Refused
from esper.kasmina.recording.visits import RecordedCall, Visits, watching


class DepthKernel(LiveKernel):
    """A new block as what it adds to its input: zero at birth.

    Args:
        block: The identity so far; committing it needs no copy.
        zeroed: Names of its parameters that start at zero.
        given: Arguments it is called with besides its input; replace it when another batch comes.
    """

    def __init__(self, block: nn.Module, zeroed: Sequence[str], given: RecordedCall) -> None:
        super().__init__()
        self.block, self.given = block, given
        self.outgoing: tuple[str, ...] = tuple(f"block.{name}" for name in zeroed)
        self.axes: Mapping[str, int] = {}

    def forward(self, y: Tensor) -> Tensor:
        """Return what the block adds."""
        return self.given.call(self.block, y) - y


@dataclass(frozen=True, eq=False)
class Stack:
    """A place where one more block fits, behind the last of its kind."""

    site: Site
    host: nn.Module
    container: str  # path
    foreign: frozenset[str]  # other children of the container, and blocks before this stack
    first: str  # name of the first block in the container
    zeroed: tuple[str, ...]
    scales: Mapping[str, Scale]  # of the last block's parameters when the run began
    given: RecordedCall

    @property
    def port(self) -> Literal["parallel", "serial"]:
        """What is added reads the last block's output."""
        return "serial"

    @property
    def donor(self) -> nn.Module:
        """The block that is copied: the last one."""
        return self.host.get_submodule(self.site.exit)

    def ends(self) -> tuple[nn.Module, nn.Module]:
        """Return the last block, twice."""
        return self.donor, self.donor

    def names(self) -> list[str]:
        """Name the blocks as they are now."""
        children = list(self.host.get_submodule(self.container)._modules)
        start = stop = children.index(self.first)
        while stop < len(children) and children[stop] not in self.foreign:
            stop += 1
        return children[start:stop]

    def refreshed(self) -> Stack:
        """Return the stack with the blocks it has now, and what one more costs, a copy of the last.

        Its FLOPs are taken to follow its weights; once it is in, the model's are counted.
        """
        names = self.names()
        last = f"{self.container}.{names[-1]}".lstrip(".")
        parameters = sum(one.numel() for one in self.host.get_submodule(last).parameters())
        flops = self.site.unit_flops * parameters // self.site.unit_parameters
        costs = {"unit_parameters": parameters, "unit_flops": flops}
        return replace(self, site=replace(self.site, entry=last, exit=last, width=len(names), **costs))

    def deepening(self) -> DeepenPlan:
        """Write down what grows when one more block comes.

        Raises:
            Refused: Its name would not say where it stands.
        """
        children = list(self.host.get_submodule(self.container)._modules)
        last = self.site.exit.rpartition(".")[2]
        index = children.index(last) + 1
        name = named(children, index, isinstance(self.host.get_submodule(self.container), nn.Sequential))
        counts = counts_of(self.host, self.container, self.site.exit, name, index)
        return DeepenPlan(self.site.name, self.container, index, name, self.site.exit, self.zeroed, counts)

    def block(self, seed: int) -> nn.Module:
        """Return a fresh block, the identity; no global stream moves."""
        return born(self.host, self.site.exit, self.scales, self.zeroed, seed)

    def kernel(self, units: int = 1) -> DepthKernel:
        """Return a fresh block as a kernel; its seed comes from torch's global stream."""
        seed = int(torch.randint(2**31, ()))
        return DepthKernel(self.block(seed), self.zeroed, self.given)

    @contextmanager
    def listening(self) -> Iterator[Visits]:
        """Note what the last block is called with while the context lasts: ``given``, ``x`` and ``y``."""
        with watching([[self.donor]]) as (visits,):
            yield visits


def named(children: Sequence[str], index: int, sequential: bool) -> str:
    """Name the block to come.

    Raises:
        Refused: A ModuleList finds its children by number, and others stand behind.
    """
    if index == len(children) and str(index) not in children:
        return str(index)
    if not sequential:
        raise Refused(
            "the ModuleList holds other modules behind the blocks, which would change their numbers"
        )
    before = children[index - 1].partition("_")[0]
    return next(name for n in range(1, len(children) + 2) if (name := f"{before}_{n}") not in children)


def widens(kernel: LiveKernel) -> bool:
    """Tell whether a kernel adds units to layers that stand, instead of a whole block."""
    return not isinstance(kernel, DepthKernel)
