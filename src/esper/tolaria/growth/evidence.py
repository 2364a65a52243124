"""What an event reads: training batches kept for it, held-out examples, and what they say of every place."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from esper.errors import ProbeError
from esper.kasmina.coupling import followed, independent
from esper.kasmina.evidence import count_examples, join
from esper.kasmina.isolation import evaluating, examining, same_generators, untouched
from esper.kasmina.lessons import first
from esper.kasmina.places import Place
from esper.kasmina.price import look_price
from esper.kasmina.reopen import SATURATED, TEMPER, How, guess, multipliable, output_layers, tempered
from esper.kasmina.score import Score, Scored
from esper.kasmina.sight import Run, differentiates
from esper.kasmina.significance import Spending, p_value, smallest

ENOUGH = "already wide enough"
SURE = 0.16  # of the learning: before it a host tells by being below early.enough in proportion
SHARE = 0.008  # of the examples that a run trains on, which an event reads at most
LEAST = 256  # examples it reads all the same: fewer are hardly evidence
BLOCKS = 32  # batches it reads where the loss couples their examples
RECENT = 20  # of the latest losses, by which a saturated host is told


@dataclass(frozen=True)
class Found:
    """What an event found."""

    scored: Mapping[str, Scored]
    held_out: float  # mean loss in eval mode, as the model is
    examples: int  # held out, or batches where the loss couples examples
    independent: bool  # whether each example is evidence of its own
    flops: int  # spent on it
    failed: Mapping[str, str]  # places where the units do not run, and what was raised

    def p_value(self, values: np.ndarray) -> float | None:
        """Return how likely evidence as strong is where nothing helps."""
        return p_value(values, blocks=None if self.independent else len(values))


class Evidence:
    """Reads training and held-out examples for the events of one run.

    Args:
        growth: The conductor.

    Attributes:
        outputs: The output layer, in a list; empty where there is none.
        guess: The loss of equal logits where the loss is cross-entropy.
        found_values: Held-out values that an event can look at: examples, or batches where these are coupled.
    """

    shared = True  # every process reads the same held-out examples
    waiting: str | None = None  # why the event came whose evidence is still being gathered
    judged_by = 0  # latest losses that tell what the held-out loss is by now

    def __init__(self, growth: Any) -> None:
        self.growth, self.parts = growth, growth.parts
        self.most: int = growth.config.early.examples  # examples of either kind that an event reads
        self.batches: deque[Any] = deque()
        self.losses: deque[float] = deque(maxlen=RECENT)
        self.outputs: list[nn.Module] = []
        self.guess: float | None = None
        self.independent: bool | None = None
        self.inner = False  # whether the loss takes gradients inside itself
        held = self.probe()
        self.learn_loss(held)
        self.found_values = sum(map(count_examples, held)) if self.independent else len(held)

    @property
    def host(self) -> nn.Module:
        """The model."""
        return self.growth.morphable.host

    @property
    def training_loss(self) -> float | None:
        """Mean of the latest training losses."""
        return sum(self.losses) / len(self.losses) if self.losses else None

    def collect(self, batch: Any, loss: float) -> None:
        """Keep a training batch, and as many before it as an event reads."""
        self.losses.append(loss)
        self.batches.append(batch)
        size = max(count_examples(batch), 1)
        if not self.independent:  # each batch is one value, so it takes as many as there may be
            self.most = max(self.growth.config.early.examples, BLOCKS * size)
        elif self.parts.steps is not None:  # a short run's events read less
            share = int(SHARE * self.parts.steps * size)
            self.most = min(max(share, LEAST), self.growth.config.early.examples)
        while len(self.batches) > 1 and (len(self.batches) - 1) * size >= self.most:
            self.batches.popleft()

    def probe(self) -> list[Any]:
        """Return the held-out examples that an event reads, batch by batch."""
        batches, count = list[Any](), 0
        with untouched(self.host, gather=True), same_generators(self.parts.probe):
            for batch in self.parts.probe:
                batches.append(batch)
                count += count_examples(batch)
                if count >= self.most:
                    break
        if not batches:
            raise ProbeError("the probe gave no batch this time; it must be readable again and again")
        return batches

    def ready(self, why: str) -> bool:
        """Tell whether the evidence for an event is there."""
        return True

    def due(self) -> str | None:
        """Return why an event came that has waited for its evidence."""
        return None

    def abandon(self) -> None:
        """Gather no more for an event that is skipped."""

    def learn_loss(self, held: Sequence[Any]) -> None:
        """Find out once what kind of loss this is."""
        few = first(held[0], 64)
        places = self.growth.morphable.places
        if self.parts.per_example is None:
            self.independent = independent(self.host, self.run, places, few)
        else:
            with evaluating(self.host), torch.enable_grad():
                self.independent = followed(self.host, self.run, places, few)
        with evaluating(self.host):
            self.inner = differentiates(self.host, places, lambda: self.run(few))
        with examining(self.host, 0):
            self.outputs = output_layers(self.host, lambda: self.parts.run(few))
            self.guess = guess(self.outputs, lambda: self.parts.run(few))

    def look(self, places: Mapping[str, Place], units: Mapping[str, int]) -> Found:
        """Measure places.

        Args:
            places: By name.
            units: To test, by name.
        """
        held = self.probe()
        seed = self.parts.streams.draw("evidence")
        score = Score(self.host, places, units, self.growth.peers, self.inner)
        alone = self.independent is True
        with tempered(self.outputs, TEMPER if self.guess is not None else 1.0):
            score.fit(self.runs([*self.batches], alone), seed)
            score.test(self.runs(held, alone), alone, seed, shared=self.shared)
        examples = sum(count_examples(batch) for batch in held)
        seen = sum(count_examples(batch) for batch in self.batches)
        flops = score.flops + self.growth.morphable.flops * (3 * min(seen, self.most) + 4 * examples)
        self.batches.clear()
        values = examples if alone else len(held)
        return Found(score.chosen, self.held_out(held), values, alone, flops, score.failed)

    def price(self, places: Mapping[str, Place], units: Mapping[str, int]) -> tuple[int, int]:
        """Return what :meth:`look` will cost at most, and how many held-out examples it reads."""
        held = sum(count_examples(batch) for batch in self.probe())
        seen = min(sum(count_examples(batch) for batch in self.batches), self.most)
        own = self.growth.morphable.flops * (3 * seen + 4 * held)
        return own + look_price(places, units, seen, held, self.inner), held

    def runs(self, batches: Sequence[Any], alone: bool) -> list[Run]:
        """Return passes over batches: joined where examples count alone, as they came where they do not."""
        given = join(batches) if alone else list(batches)
        few = [first(batch, self.most) for batch in given]
        return [((lambda b=batch: self.run(b)), count_examples(batch)) for batch in few]

    def run(self, batch: Any) -> Tensor:
        """Return the loss that is evidence: the user's, or the mean of what ``per_example`` gives."""
        if self.parts.per_example is None:
            return self.parts.run(batch)
        return self.parts.per_example(self.host, batch).mean()

    @property
    def smallest(self) -> int:
        """The fewest held-out values that could pass."""
        places = max(len(self.growth.morphable.places), 1)
        share = Spending(self.growth.config.early.false_keep).most
        alone = share if places == 1 else share / 2 / places
        return smallest(alone, of_blocks=self.independent is not True)

    def held_out(self, held: Sequence[Any] | None = None) -> float:
        """Return the mean held-out loss in eval mode; rank 0's counts."""
        total = examples = 0.0
        batches = self.probe() if held is None else held
        with examining(self.host, 0):
            for batch in join(batches) if self.independent else batches:
                count = count_examples(batch)
                total += float(self.parts.run(batch)) * count
                examples += count
        return self.growth.peers.agree([total / examples])[0]

    def doubts(self) -> list[str]:
        """Say at the start what would keep anything from passing."""
        if self.parts.example is not None or self.found_values >= self.smallest:
            return []
        what, more = "examples", "hold out more"
        if not self.independent:
            what, more = "batches, whose examples the loss couples", "hold out more, or pass per_example="
        return [
            f"the probe has {self.found_values} {what}; with fewer than {self.smallest} nothing can pass: "
            f"{more}"
        ]

    def enough(self, held_out: float, learned: float) -> str:
        """Say so where a host that has not grown learns nearly all there is by itself: it has room.

        Measured at .03, .07, .11 and .17 of the learning, in shares of a guess's loss: full-size nets are at
        .28 to .42, .10 to .17, .05 to .13, .03 to .11, ones that gain by growing at .59 to 1, .2 to .98,
        .13 to .9, .1 to .7 (digits, letters, texture). One that is below the line early is asked again.

        Args:
            held_out: Mean loss.
            learned: The share of its learning that the run has done.
        """
        if self.guess is None:
            return ""
        share, least = held_out / self.guess, self.growth.config.early.enough
        told = f"its held-out loss is {share:.1%} of a guess's"
        if share < least:
            return f"{ENOUGH}: {told}"
        return f"it learns fast by itself: {told}" if share * learned < least * SURE else ""

    def saturated(self) -> bool:
        """Tell whether the loss is cross-entropy and nearly satisfied on what the host trains on."""
        guess, training = self.guess, self.training_loss
        return guess is not None and training is not None and training < SATURATED * guess

    def reopening(self, setting: How | Literal["auto"]) -> How:
        """Return how to re-open the host; ``auto`` is for cross-entropy that is nearly satisfied."""
        how: How = "no"
        if setting == "auto":
            how = "output" if self.saturated() else "no"
        elif setting != "output" or self.guess is not None:
            how = setting
        if how == "output" and not multipliable(self.host, self.outputs):
            return "no"  # not every argmax would stay
        return how

    def state_dict(self) -> dict[str, Any]:
        """Return what was kept for the next event."""
        return {"batches": list(self.batches), "losses": list(self.losses), "most": self.most}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on."""
        self.batches.extend(state["batches"])
        self.losses.extend(state["losses"])
        self.most = state["most"]
