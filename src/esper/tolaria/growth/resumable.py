"""What checkpoints ask of a run that grows, and how it goes on in another process."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from esper.config import Config
from esper.contracts import Event
from esper.distributed.collectives import Peers
from esper.distributed.model_wrapper import Wrapping
from esper.errors import EsperError, StateError
from esper.nissa.run.journal import RunJournal
from esper.printable import raised
from esper.saving.genome import Plan
from esper.tolaria.growth.loop import Loop
from esper.tolaria.growth.memory import capture, restore
from esper.tolaria.growth.run.state import RunState
from esper.tolaria.growth.run.telling import started


class Resumable:
    """A run whose state can be taken out, and put into a fresh one.

    Attributes:
        loop: What happens at each step.
    """

    loop: Loop

    @property
    def run(self) -> RunState:
        """What the run knows of itself."""
        return self.loop.run

    @property
    def config(self) -> Config:
        """The settings, with what the call overrode."""
        return self.run.config

    @property
    def steps(self) -> int:
        """Optimizer steps acted on."""
        return self.run.steps

    @property
    def plans(self) -> list[Plan]:
        """Everything that grew and changed the model's shape, in order."""
        return self.run.plans

    @property
    def host(self) -> nn.Module:
        """The model whose layers grow, inside whatever stands around it."""
        return self.run.morphable.host

    @property
    def wrapping(self) -> Wrapping:
        """What stands around it where several processes train it."""
        return self.run.parts.wrapping

    @property
    def peers(self) -> Peers:
        """The processes that train this model together."""
        return self.run.peers

    @property
    def journal(self) -> RunJournal | None:
        """What this process journals to."""
        return self.loop.redo.journal

    def observe(self, event: Event) -> None:
        """Tell whoever listens."""
        self.run.parts.observe(event)

    def awake(self) -> list[dict[str, object]]:
        """List the seeds that are not dormant: stage, α, evidence."""
        return self.run.orchestrator.table()

    def gates(self) -> dict[str, int]:
        """Count the looks at held-out evidence, and what was kept after them."""
        return {"looks": self.run.parts.gate.looks, "kept": self.run.events_kept}

    def state_dict(self) -> dict[str, object]:
        """Return everything but the model's and the optimizers' own state, which the user saves as always."""
        return dict(capture(self.run, self.loop.early, self.loop.watch))

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on where the saved run was: widens a fresh model and its optimizers first.

        Load the model's and the optimizers' own state afterwards; their shapes fit by then.

        Raises:
            StateError: The state is of another model or version, or this run has begun.
        """
        run = self.run
        if not isinstance(state, Mapping):
            raise StateError(f"a {type(state).__name__} is no state; give what state_dict() returned")
        if run.steps or run.plans:
            raise StateError(
                "this run has begun already; load the state right after esper.grow on a fresh model"
            )
        with run.morphable.policy.uncompiled(), self.wrapping.reshaping(run.parts.optimizers):
            try:
                restore(run, state, self.loop.early, self.loop.watch)
            except (
                LookupError,
                TypeError,
                AttributeError,
                ValueError,
                RuntimeError,
                AssertionError,
            ) as error:
                if isinstance(error, EsperError):
                    raise
                raise StateError(
                    f"the state does not fit this run: {raised(error)}; build model, optimizer and run anew"
                ) from error
        run.topology_changed()
        self.loop.redo.read()
        self.tell_start()  # the sites are other ones by now

    def tell_start(self) -> None:
        """Tell what the run begins, or goes on, with."""
        run = self.run
        run.tell("run_started", **started(run.parts, run.recipe))
        for message in run.parts.warnings:
            run.tell("warning", message=message)
