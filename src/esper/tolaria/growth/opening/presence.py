"""What a run has in the user's model and optimizers while it lasts; gone when the run ends, or is dropped.

Nothing here holds the run itself: hooks of the user's optimizers would keep it alive for as long as these.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping

from torch import nn
from torch.optim import Optimizer

from esper.errors import SiteError
from esper.kasmina.race.orchestrator import SeedOrchestrator
from esper.kasmina.seeds.layer import KasminaLayer
from esper.surgery.isolation.seam import gateways_of
from esper.surgery.optimizers.clock import Clock
from esper.surgery.optimizers.closures import before_closures

LIVE: weakref.WeakKeyDictionary[nn.Module, weakref.ref[object]] = (
    weakref.WeakKeyDictionary()
)  # host -> its run


class Presence:
    """The hooks of one run in the user's optimizers.

    Args:
        optimizers: By name, see :class:`Clock`.
        orchestrator: Whose exposed kernels' gradients a closure does not know of.

    Attributes:
        clock: Counts steps.
        evaluations: Of closures, since the last step.
        closers: What takes a hook out, each; they must not hold the run.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer], orchestrator: SeedOrchestrator) -> None:
        self.clock = Clock(optimizers)
        self.evaluations = 0
        self.orchestrator = weakref.ref(orchestrator)
        hooks = [before_closures(one, self._begin_evaluation) for one in optimizers.values()]
        self.closers: list[Callable[[], object]] = [self.clock.close, *(hook.remove for hook in hooks)]

    def _begin_evaluation(self) -> None:
        """Clear exposed kernels' gradients: a closure clears the host's and knows of no other."""
        self.evaluations += 1
        orchestrator = self.orchestrator()
        for trial in [] if orchestrator is None else orchestrator.exposed:
            trial.kernel.zero_grad()

    def close(self) -> None:
        """Take every hook out of the user's optimizers."""
        while self.closers:
            self.closers.pop()()


def begin(growth: object, host: nn.Module, presence: Presence) -> weakref.finalize[..., object]:
    """Note that a run grows a model.

    Returns:
        What takes everything out again: called at its end, or by itself once nobody holds the run any more.
    """
    LIVE[host] = weakref.ref(growth)
    return weakref.finalize(growth, leave, weakref.ref(host), presence)


def leave(held: weakref.ref[nn.Module], presence: Presence) -> None:
    """Take hooks out of the optimizers and seams out of the model."""
    presence.close()
    host = held()
    if host is None:
        return
    LIVE.pop(host, None)
    seen = [gateway for module in host.modules() for _, gateway in gateways_of(module)]
    for gateway in {id(one): one for one in seen}.values():
        if isinstance(gateway, KasminaLayer):
            gateway.close()


def refuse_growing(host: nn.Module) -> None:
    """Refuse a model of which any part is being grown already: neither run could keep its budget.

    Raises:
        SiteError: With what to do.
    """
    if not shared_by(host):
        return
    gc.collect()  # one that was dropped may still lie in a cycle of its own
    if names := shared_by(host):
        raise SiteError(
            f"{' and '.join(names)} is being grown already, by an esper.grow that has not ended; call "
            "finish() on what that returned first"
        )


def shared_by(host: nn.Module) -> list[str]:
    """Name the models under growth that share a module with parameters with a host."""
    own = {id(module) for module in host.modules() if next(module.parameters(), None) is not None}
    return [
        "the model" if other is host else f"a {type(other).__name__} that shares layers with the model"
        for other, run in list(LIVE.items())
        if run() is not None and any(id(module) in own for module in other.modules())
    ]
