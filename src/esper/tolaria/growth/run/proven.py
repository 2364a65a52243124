"""Places whose surroundings have changed since they were proven are proven again before an event asks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from torch import nn
from torch.nn.utils import parametrize

from esper.batches.cropped import trials
from esper.batches.examples import count_examples
from esper.kasmina.proving.proving import Pass, Proof
from esper.kasmina.proving.surroundings import surroundings
from esper.kasmina.widths.layers import features
from esper.kasmina.widths.places import WidenPlace
from esper.tolaria.growth.run.state import RunState

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
        self.known = now
        pairs = {name: place for name, place in run.morphable.pairs.items() if name not in gone}
        self.why = {name: made for name, place in pairs.items() if (made := parametrised(place))}
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
        with run.morphable.policy.uncompiled(), run.parts.wrapping.gathered():
            found = Proof(run.morphable.host, calls, [self.call(one) for one in others]).unproven(places)
        return {name: f"the model is not what it was at esper.grow: {why}" for name, why in found.items()}

    def call(self, batch: object) -> Pass:
        """Return what takes the loss of a batch."""
        return lambda model: self.run.parts.loss_of(batch)


def parametrised(place: WidenPlace) -> str:
    """Say which layer of a place has a weight that is made in the pass by now; "" if none has."""
    for path, layer in zip((place.site.entry, *place.site.exits), place.ends(), strict=True):
        if is_made(layer):
            return f"the weight of {path} is parametrised (or pruned) since esper.grow"
    return ""


def is_made(layer: nn.Module) -> bool:
    """Tell a layer with a weight or bias that is no parameter of its own."""
    with suppress(AttributeError):
        return parametrize.is_parametrized(layer) or any(
            getattr(layer, own) is not None and own not in layer._parameters for own in ("weight", "bias")
        )
    return False  # a recurrent layer has other names
