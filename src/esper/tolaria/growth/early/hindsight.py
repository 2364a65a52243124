"""What the weights from before an event would lose now.

A loss may change while it is trained on: a penalty is warmed up, a term fades in. What was measured at the
event says nothing of today's loss then, so the weights of then are put into a copy of the model as it is and
measured again, on the same examples as the weights of now.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from esper.batches.examples import count_examples
from esper.contracts import DeepenPlan
from esper.errors import ProcessError, SurgeryError
from esper.kasmina.depth.deepen import at
from esper.surgery.isolation.attributes import fresh
from esper.surgery.isolation.copies import on_copies
from esper.tolaria.growth.early.insertion import Insertion
from esper.tolaria.growth.early.judged import Judged
from esper.tolaria.growth.early.takeback import Before, named
from esper.tolaria.growth.evidence.evidence import Evidence
from esper.tolaria.growth.run.state import RunState

ALIKE = 1e-6  # relative: a loss that differs by less is the one that was measured at the event


class Hindsight:
    """Compares the weights from before an event with those of now.

    Args:
        run: What the run knows of itself.
        evidence: What is held out.
        insertion: Which knows what a pass cost before the event.
    """

    def __init__(self, run: RunState, evidence: Evidence, insertion: Insertion) -> None:
        self.run, self.evidence, self.insertion = run, evidence, insertion

    def losses(self, judged: Judged) -> tuple[float, float]:
        """Return the held-out loss of the weights from before an event, and of those of now.

        The first is the one remembered where the loss has not changed, or cannot be taken.
        """
        evidence, run = self.evidence, self.run
        held = evidence.judged_on()
        now = evidence.held_out(held)
        (then,) = run.peers.broadcast_floats([self.earlier(judged, held)])
        flops: int = run.morphable.flops + self.insertion.flops_before
        run.cost.grow(flops * sum(map(count_examples, held)))
        known = judged.record.held_out
        same = known is not None and math.isclose(then, known, rel_tol=ALIKE)
        return judged.held_out if same or not math.isfinite(then) else then, now

    def earlier(self, judged: Judged, held: Sequence[object]) -> float:
        """Return what the weights from before an event lose now; NaN where that cannot be told."""
        if self.overtaken(judged):
            return math.nan
        try:
            with self.weights_of(judged.before):
                return self.evidence.in_hindsight(held, judged.held_out)
        except ProcessError:
            raise
        except Exception as error:  # the user's model and loss run here: they raise what they like
            self.run.mishaps.say(
                "an event is judged by the loss measured when it came; the weights of then do not run now: "
                f"{type(error).__name__}: {error}"
            )
            return math.nan

    def overtaken(self, judged: Judged) -> str:
        """Say what is another than it was at an event, so that there is no way back to it; "" mostly."""
        return judged.before.overtaken(self.insertion.models, self.run.plans)

    @contextmanager
    def weights_of(self, before: Before) -> Iterator[None]:
        """Let the host have the shapes, weights and buffers it had, on copies, for a while.

        Weights are copied once they are what they were: those of now would be as much memory again.
        """
        host, plans = self.run.morphable.host, self.run.plans
        own = {id(tensor) for _, tensor in named(host)}
        copies = Hollow()
        with on_copies(host, copies.of), same_counts(host, before.deeper(plans)):
            shared = [name for name, tensor in named(host) if id(tensor) in own]
            if shared:  # of a scripted module, say: its own weights would be overwritten
                raise SurgeryError(f"{shared[0]} cannot be copied")
            before.put_back(host, plans)
            copies.fill(host)
            yield


class Hollow:
    """Makes copies of parameters that have nothing in them yet."""

    def __init__(self) -> None:
        self.made: dict[int, tuple[Tensor, nn.Parameter]] = {}  # what is to be filled, and its original

    def of(self, parameter: nn.Parameter) -> Tensor:
        """Make one."""
        if type(parameter) is not nn.Parameter or not parameter.numel():
            return fresh(parameter)
        hollow = nn.Parameter(parameter.detach().new_empty(0), requires_grad=parameter.requires_grad)
        self.made[id(hollow)] = hollow, parameter
        return hollow

    def fill(self, model: nn.Module) -> None:
        """Copy the parameters that are still empty, for they came later: they are what they are now."""
        for parameter in model.parameters():
            if id(parameter) in self.made and not parameter.numel():
                parameter.data = self.made[id(parameter)][1].detach().clone()


@contextmanager
def same_counts(model: nn.Module, plans: Sequence[DeepenPlan]) -> Iterator[None]:
    """Put back what counts blocks and is no module: a config is shared, not copied."""
    counts = [(at(model, path), name) for plan in plans for path, name, _ in plan.counts]
    kept = [(owner, name, getattr(owner, name)) for owner, name in counts if not isinstance(owner, nn.Module)]
    try:
        yield
    finally:
        for owner, name, value in kept:
            setattr(owner, name, value)
