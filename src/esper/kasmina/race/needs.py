"""What the orchestrator needs of other rooms: protocols, and what stands in where there is nothing to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.optim import Optimizer

from esper.batches.joins import Joins
from esper.blueprints.kernel import LiveKernel
from esper.contracts import Decision, Observer
from esper.distributed.collectives import Peers
from esper.distributed.model_wrapper import Wrapping
from esper.kasmina.race.gate import Gate
from esper.kasmina.race.own_optimizers import OwnOptimizers
from esper.kasmina.recording.flops import Ledger
from esper.kasmina.widths.places import Place


class Runs(Protocol):
    """Runs the host."""

    def loss_of(self, batch: object) -> Tensor:
        """Return the scalar loss of a batch, through the host as it is."""


class Commits(Protocol):
    """Makes a kernel part of the user's layers."""

    def keep(
        self, kernel: LiveKernel, optimizer: Optimizer, decision: Decision, step: int, slot: int = 0
    ) -> str:
        """Return "", or why everything was put back; the slot is that of the seed at the decision's site."""


class Forges(Protocol):
    """Has kernels compiled."""

    def file(self, kernel: LiveKernel, place: Place, hidden: int, x: Tensor | None) -> None:
        """File a request for a compiled form, and wait for nothing."""


class Draws(Protocol):
    """Has random streams with names."""

    def draw(self, name: str) -> int:
        """Draw a seed from one of them."""


class Scales(Protocol):
    """Scales the loss before its backward pass, as AMP does."""

    def get_scale(self) -> float:
        """Return by how much."""


class Unforged:
    """Compiles nothing: the host's own graph holds the kernel."""

    def file(self, kernel: LiveKernel, place: Place, hidden: int, x: Tensor | None) -> None:
        """Do nothing."""


class Unscaled:
    """Leaves the loss as it is."""

    def get_scale(self) -> float:
        """Return 1."""
        return 1.0


@dataclass(frozen=True)
class Services:
    """What a run lends its orchestrator."""

    passes: Runs
    gate: Gate
    ledger: Ledger
    observe: Observer
    donor: OwnOptimizers
    committer: Commits
    forging: Forges
    streams: Draws
    scaler: Scales
    wrapping: Wrapping  # where it is deferred, a kernel that has passed waits for commit_waiting()
    joins: Joins
    rate: float | None  # the candidates' learning rate, if the user chose one

    @property
    def peers(self) -> Peers:
        """The processes that train this model."""
        return self.wrapping.peers
