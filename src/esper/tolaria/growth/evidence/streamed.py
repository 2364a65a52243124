"""Evidence from the stream itself: a batch that comes is held out until it is learned from.

For runs that see each example once. When an event is due the weights are remembered; the batches of the next
steps, which those weights have not learned from, are the evidence. The look is taken at the remembered
weights; what passes is inserted into the weights as they are by then, a few steps later.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from esper.batches.examples import copied, count_examples
from esper.tolaria.growth.evidence.evidence import RECENT, Evidence, EvidenceState, Found
from esper.tolaria.growth.run.state import RunState

SAMPLE = 64  # examples that tell, at the judgement, whether the loss itself has changed since the event


class Streamed(Evidence):
    """Reads the coming batches.

    Attributes:
        waiting: Why the event came whose evidence is being gathered.
        sample: Some of the evidence of an event that is still judged.
        sampled: Their mean loss at the event.
        parted: By what the loop divides a loss, for it accumulates gradients, before it hands it over.
    """

    repeats = (
        "most examples that came next had been trained on before, so they are no evidence: probe='stream' is "
        "for runs that see each example once; hold examples out, and pass them as probe="
    )
    shared = False
    dear = math.inf
    judged_by = RECENT

    def __init__(self, run: RunState) -> None:
        self.coming: list[object] = []
        self.earlier: dict[str, Tensor] = {}
        self.sample: list[object] = []
        self.sampled, self.parted = 0.0, 1
        super().__init__(run)

    def ready(self, why: str) -> bool:
        """Remember the weights where an event is due; from then on collect what they have not seen."""
        if self.waiting is None:
            self.waiting = why
            self.earlier = {name: p.detach().clone() for name, p in self.host.named_parameters()}
            return False
        return sum(map(count_examples, self.coming)) >= self.most

    def due(self) -> str | None:
        """Return why the event came whose evidence is complete."""
        return self.waiting if self.waiting is not None and self.ready(self.waiting) else None

    def collect(self, batch: object, loss: float) -> None:
        """Keep a batch: as evidence while an event waits for it."""
        if self.waiting is None:
            super().collect(batch, loss)
        elif count_examples(batch):
            self.losses.append(loss)
            self.size = max(self.size, count_examples(batch))
            self.coming.append(copied(batch))

    def probe(self) -> list[object]:
        """Return the batches that have come; at the start, the example."""
        return self.coming or [self.parts.example]

    def named_probe(self) -> dict[str, object]:
        """Return the example."""
        return {"the example": self.parts.example}

    def go_on(self) -> Found | None:
        """Measure places at the weights the batches have not been learned by; all at once, for these go."""
        with self.at_earlier_weights():
            found = super().go_on()
        self.sample = sampled(self.coming)
        self.abandon()
        return found

    def doubts(self) -> list[str]:
        """Doubt nothing: what comes is not known yet."""
        return []

    def abandon(self) -> None:
        """Gather no more for an event that is skipped; its batches are learned from by now."""
        super().abandon()
        self.coming.clear()
        self.earlier.clear()
        self.waiting = None

    def held_out(self, held: Sequence[object] | None = None) -> float:
        """Return the mean of the latest losses: each was taken before its batch was learned from."""
        return self.run.peers.broadcast_floats([sum(self.losses) / len(self.losses)])[0]

    def remember(self) -> None:
        """Measure the sample: the same weights lose the same on it later, or the loss has changed."""
        self.sampled, handed = self.mean_loss(self.sample), self.losses[-1]
        self.parted = max(round(self.sampled / handed), 1) if handed and math.isfinite(self.sampled) else 1

    def judged_on(self) -> list[object]:
        """Return the sample."""
        return self.sample

    def in_hindsight(self, held: Sequence[object], remembered: float) -> float:
        """Return what was remembered, and by what the loss of the sample has changed since.

        Losses handed to ``growth.step`` come with dropout on, and may be a part of what ``loss_fn`` returns.
        """
        return remembered + (self.mean_loss(held) - self.sampled) / self.parted

    @contextmanager
    def at_earlier_weights(self) -> Iterator[None]:
        """Let the host have the remembered weights for a few passes."""
        own = dict(self.host.named_parameters())
        now = {name: own[name].detach().clone() for name in self.earlier}
        try:
            with torch.no_grad():
                for name, tensor in self.earlier.items():
                    own[name].copy_(tensor)
            yield
        finally:
            with torch.no_grad():
                for name, tensor in now.items():
                    own[name].copy_(tensor)

    def state_dict(self) -> EvidenceState:
        """Return what was gathered."""
        state = super().state_dict()
        state["coming"], state["earlier"], state["waiting"] = self.coming, self.earlier, self.waiting
        state["sample"], state["sampled"], state["parted"] = self.sample, self.sampled, self.parted
        return state

    def load_state_dict(self, state: EvidenceState) -> None:
        """Go on gathering."""
        super().load_state_dict(state)
        self.coming, self.earlier = list(state["coming"]), dict(state["earlier"])
        self.waiting = state["waiting"]
        self.sample, self.sampled = list(state.get("sample", [])), state.get("sampled", 0.0)
        self.parted = state.get("parted", 1)


def sampled(batches: Sequence[object]) -> list[object]:
    """Return the first batches that hold a sample's examples."""
    found, count = list[object](), 0
    for batch in batches:
        if count < SAMPLE:
            found.append(batch)
            count += count_examples(batch)
    return found
