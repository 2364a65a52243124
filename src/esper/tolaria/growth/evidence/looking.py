"""A look at all places, in portions: all at once where a step is cheap, else one portion per step.

What an event reads is worth many training steps. Where these take long, a step of the loop reads one portion:
the weights move on meanwhile, and the evidence stays what it is. Units and directions are fitted on training
examples before any held-out example is read, and each of these gives the decrease of its own loss at the
weights of that step: on noise its mean is zero or less, whatever they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

from esper.batches.examples import count_examples
from esper.kasmina.evidence.reopen import tempered
from esper.kasmina.evidence.score import Score, pool_size
from esper.kasmina.evidence.score_memory import read_back, written
from esper.kasmina.evidence.sight import Run
from esper.kasmina.widths.places import Place
from esper.surgery.isolation.contexts import same_randomness
from esper.tolaria.growth.evidence.held import thinned

if TYPE_CHECKING:
    from esper.tolaria.growth.evidence.evidence import Evidence

DEAR = 2**33  # FLOPs of a training step from which on a look is spread over steps: .1 to .4 s of one core


class LookState(TypedDict):
    """A look that is under way, as a checkpoint keeps it."""

    units: dict[str, int]
    seed: int
    at: int
    lost: list[list[float]]
    fitted: float | None
    score: Any  # what ``score_memory`` writes and reads


class Look:
    """One look.

    Args:
        evidence: What is read, and the host.
        places: By name.
        units: To test, by name.
        held: Held-out batches.
        seed: Of pools and passes.
        spread: Whether one step reads one portion.

    Attributes:
        at: Portions that have been read.
    """

    def __init__(
        self,
        evidence: Evidence,
        places: Mapping[str, Place],
        units: Mapping[str, int],
        held: Sequence[object],
        seed: int,
        spread: bool,
    ) -> None:
        self.evidence, self.held, self.seed, self.spread = evidence, list(held), seed, spread
        self.score = Score(evidence.host, places, units, evidence.run.peers, evidence.inner)
        self.alone = evidence.independent is True
        shown = thinned(held, evidence.most, evidence.parts.seed) if self.alone else held
        fits = self.parted(evidence.runs([*evidence.batches], self.alone))
        tests = self.parted(evidence.runs(shown, self.alone))
        losses = [[one] for one in evidence.laid_out(held, evidence.independent)] if spread else [self.held]
        self.lost: list[list[float]] = []  # mean held-out loss and examples, portion by portion
        self.at = 0
        self.jobs: list[Callable[[Look], None]] = [  # none of them holds it: it goes with the last who does
            *(partial(Look.fit, index=i, runs=runs) for i, runs in enumerate(fits)),
            *(partial(Look.settle, names=names) for names in self.shares()),
            *(partial(Look.test, index=i, runs=runs) for i, runs in enumerate(tests)),
            *(partial(Look.measure, batches=batches) for batches in losses),
        ]

    def parted(self, runs: Sequence[Run]) -> list[list[Run]]:
        """Return the passes of each portion."""
        return [[run] for run in runs] if self.spread else [list(runs)]

    def shares(self) -> list[list[str]]:
        """Return the places that are settled together: as many as take about as long as a training step."""
        score, most = self.score, self.evidence.step_flops
        if not self.spread:
            return [list(score.places)]
        with same_randomness(0):  # a kernel is drawn to see how large a pool is
            pools = {name: pool_size(place, score.units[name]) for name, place in score.places.items()}
        shares, cost = [list[str]()], 0.0
        for name, place in score.places.items():
            own, pool = place.site.width + 1, pools[name]
            price = own**2 * (own + 4 * pool) + pool**2 * (own + 16 * score.units[name])
            if shares[-1] and cost + price > most:
                shares, cost = [*shares, list[str]()], 0.0
            shares[-1].append(name)
            cost += price
        return shares

    @property
    def complete(self) -> bool:
        """Whether all portions have been read."""
        return self.at == len(self.jobs)

    def go_on(self) -> bool:
        """Read the next portion, or all of them; tells whether the look was complete, or is at once."""
        if self.complete:
            return True
        for job in self.jobs[self.at : self.at + 1 if self.spread else None]:
            job(self)
            self.at += 1
        return not self.spread

    def fit(self, index: int, runs: Sequence[Run]) -> None:
        """Read training examples."""
        evidence, batches = self.evidence, [*self.evidence.batches]
        if index == 0:
            evidence.saturation.fitted = evidence.fit_of(batches[-1:] if self.spread else batches)
            self.score.draw(self.seed)
        with self.tempered(), self.score.reading(self.seed + index):
            self.score.learn_from(runs)

    def settle(self, names: Sequence[str]) -> None:
        """Pick units at some places."""
        with self.score.reading(self.seed):
            self.score.settle([name for name in names if name in self.score.sums])

    def test(self, index: int, runs: Sequence[Run]) -> None:
        """Read held-out examples."""
        with self.tempered(), self.score.reading(self.seed + index):
            self.score.weigh(runs, self.alone)

    def measure(self, batches: Sequence[object]) -> None:
        """Measure the held-out loss."""
        self.lost.append([self.evidence.held_out(batches), sum(map(count_examples, batches))])

    def tempered(self) -> AbstractContextManager[object]:
        """Read logits that are no longer saturated."""
        saturation = self.evidence.saturation
        return tempered(saturation.outputs, saturation.temper)

    @property
    def held_out(self) -> float:
        """Mean held-out loss."""
        if len(self.lost) == 1:
            return self.lost[0][0]
        return sum(loss * count for loss, count in self.lost) / sum(count for _, count in self.lost)

    def state_dict(self) -> LookState:
        """Return what was read so far."""
        return {
            "units": dict(self.score.units),
            "seed": self.seed,
            "at": self.at,
            "lost": list(self.lost),
            "fitted": self.evidence.saturation.fitted,
            "score": written(self.score),
        }

    @classmethod
    def from_state(cls, state: LookState, evidence: Evidence, held: Sequence[object]) -> Look:
        """Go on; only a look that is spread is under way when a run is saved."""
        places = {name: evidence.run.morphable.places[name] for name in state["units"]}
        look = cls(evidence, places, state["units"], held, state["seed"], spread=True)
        look.at, look.lost = state["at"], [list(one) for one in state["lost"]]
        evidence.saturation.fitted = state["fitted"]
        read_back(look.score, state["score"])
        return look
