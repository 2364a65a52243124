"""Places whose surroundings have changed since they were proven are proven again before an event asks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from torch import nn
from torch.nn.utils import parametrize

from esper.batches.cropped import trials
from esper.batches.examples import count_examples
from esper.kasmina.proving.proving import Pass, Proof
from esper.kasmina.proving.surroundings import changed, surroundings
from esper.kasmina.proving.suspects import NUMBER
from esper.kasmina.widths.layers import features
from esper.kasmina.widths.places import WidenPlace
from esper.tolaria.growth.run.state import RunState

SHOWN = 3  # modules that a reason names
PASSES = 10  # forward ones, of which a proof costs about as much


class Proven:
    """Remembers what a model was like when its places were proven.

    Args:
        run: What the run knows of itself.
    """

    def __init__(self, run: RunState) -> None:
        self.run = run
        self.known = surroundings(run.morphable.host)
        self.why: dict[str, str] = {}
        self.other: list[str] = []  # modules that were another when this was last looked at

    def refused(self, gone: Mapping[str, str]) -> dict[str, str]:
        """Return the places that cannot grow any more, and why; nothing runs unless something has changed.

        Several processes would have to agree on what their own batches show; there nothing is proven again.

        Args:
            gone: Places of which a layer is not in the model any more.
        """
        run = self.run
        now = surroundings(run.morphable.host)
        if now == self.known or not run.batches or run.peers.world > 1:
            return self.why
        self.other, self.known = changed(self.known, now), now
        pairs = {name: place for name, place in run.morphable.pairs.items() if name not in gone}
        self.why = {
            name: found
            for name, place in pairs.items()
            if (found := parametrised(place) or renamed(place, run.morphable.host))
        }
        left = {name: place for name, place in pairs.items() if name not in self.why}
        if left:
            self.why |= self.tried(left)
        return self.why

    def tried(self, places: Mapping[str, WidenPlace]) -> dict[str, str]:
        """Grow places on copies."""
        run, batch = self.run, self.run.batches[-1]
        run.cost.grow(run.morphable.flops * PASSES * count_examples(batch))
        few, others = trials(batch, features(run.morphable.host))
        calls = [self.call(one) for one in (batch, *few)]
        alone = run.orchestrator.aside(
            None, hidden=True
        )  # a kernel that is let in adds to layers as they are
        with run.morphable.policy.uncompiled(), run.parts.wrapping.gathered(), alone:
            found = Proof(run.morphable.host, calls, [self.call(one) for one in others]).unproven(places)
        others = f" ({', '.join(self.other[:SHOWN])})" if self.other else ""
        since = f"the model is not what it was at esper.grow{others}"
        return {name: f"{since}: {why.removesuffix(f'; {NUMBER}')}" for name, why in found.items()}

    def call(self, batch: object) -> Pass:
        """Return what takes the loss of a batch."""
        return lambda model: self.run.parts.loss_of(batch)


def parametrised(place: WidenPlace) -> str:
    """Say which layer of a place has a weight that is made in the pass by now; "" if none has."""
    for path, layer in zip((place.site.entry, *place.site.exits), place.ends(), strict=True):
        if is_made(layer):
            return f"the weight of {path} is parametrised (or pruned) since esper.grow"
    return ""


def renamed(place: WidenPlace, host: nn.Module) -> str:
    """Say which tensor a place's growth would change is under its name no more, or has a second one."""
    held = [*host.named_parameters(remove_duplicate=False), *host.named_buffers(remove_duplicate=False)]
    tensors = dict(held)
    for edit in place.plan(place.site.granularity).edits:
        tensor = tensors.get(edit.name)
        if tensor is None or tensor.dim() <= edit.axis or tensor.shape[edit.axis] != edit.old:
            return f"{edit.name} is not in the model any more, or is another, since esper.grow"
        if others := [name for name, one in held if one is tensor and name != edit.name]:
            return f"{edit.name} is tied to {', '.join(others)} since esper.grow"
    return ""


def is_made(layer: nn.Module) -> bool:
    """Tell a layer with a weight or bias that is no parameter of its own."""
    with suppress(AttributeError):
        return parametrize.is_parametrized(layer) or any(
            getattr(layer, own) is not None and own not in layer._parameters for own in ("weight", "bias")
        )
    return False  # a recurrent layer has other names
