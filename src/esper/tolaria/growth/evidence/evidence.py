"""What an event reads: training batches kept for it, held-out examples, and what they say of every place."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from esper.batches.examples import copied, count_examples
from esper.batches.known import Known
from esper.batches.portions import largest, portions
from esper.kasmina.evidence.coupling import ASKED, followed, independent
from esper.kasmina.evidence.price import look_price
from esper.kasmina.evidence.score import Scored
from esper.kasmina.evidence.sight import Run, differentiates, judging
from esper.kasmina.evidence.significance import Spending, p_value, smallest
from esper.kasmina.race.schedule import first
from esper.kasmina.widths.places import Place
from esper.surgery.isolation.contexts import evaluating, examining, same_generators, untouched
from esper.tolaria.growth.evidence.held import held_batches, refuse_not_finite
from esper.tolaria.growth.evidence.looking import DEAR, Look, LookState
from esper.tolaria.growth.evidence.saturation import Saturation
from esper.tolaria.growth.run.state import RunState

SHARE = 0.008  # of the examples that a run trains on, which an event reads at most
LATEST = 2  # training batches on which what has grown must run
LEAST = 256  # examples it reads all the same: fewer are hardly evidence
BLOCKS = 32  # batches it reads where the loss couples their examples
UNTOLD = (
    "batches, each one value: whether the loss couples their examples cannot be told, for they are too few "
    "in a batch, or no gradient or no row of it is theirs"
)
UNLEARNED = (
    "in evaluation mode the loss has no gradient, so nothing can pass: the model detaches what it returns "
    "there, or computes it under no_grad; detach behind the call of the model, where the loop evaluates"
)
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


class EvidenceState(TypedDict):
    """What was kept for the next event, as a checkpoint keeps it."""

    batches: list[object]
    losses: list[float]
    most: int
    size: NotRequired[int]
    look: NotRequired[LookState | None]
    coming: NotRequired[list[object]]  # from here on where the stream is its own probe
    earlier: NotRequired[dict[str, Tensor]]
    waiting: NotRequired[str | None]
    sample: NotRequired[list[object]]
    sampled: NotRequired[float]
    parted: NotRequired[int]


class Evidence:
    """Reads training and held-out examples for the events of one run.

    Args:
        run: What the run knows of itself.

    Attributes:
        saturation: What cross-entropy tells of the host.
        found_values: Held-out values that an event can look at: examples, or batches where these are coupled.
    """

    repeats = (
        "most examples of the probe are among those trained on, where new units seem to help whatever they "
        "do: hold examples out, or pass probe='stream' where each is seen once"
    )
    shared = True  # every process reads the same held-out examples
    waiting: str | None = None  # why the event came whose evidence is still being gathered
    dear: float = DEAR
    judged_by = 0  # latest losses that tell what the held-out loss is by now

    def __init__(self, run: RunState) -> None:
        self.run, self.parts = run, run.parts
        self.most: int = run.config.early.examples  # examples of either kind that an event reads
        self.batches: deque[object] = deque()
        self.latest: list[object] = []  # training batches of the event at hand
        self.size = 0  # examples in the loop's largest batch
        self.losses: deque[float] = deque(maxlen=RECENT)
        self.saturation = Saturation(self.host, run.config.early.enough)
        self.independent: bool | None = None
        self.inner = False  # whether the loss takes gradients inside itself
        self.learns = True  # whether the loss has a gradient in evaluation mode
        self.known = Known()
        self.under_way: Look | None = None  # what an event is measuring
        self.read: list[object] = []  # held-out batches that an event is about to look at
        self.empty: list[int] = []  # batches of the probe in which no target counts
        held = self.named_probe()
        with evaluating(self.host), untouched(self.host, 0):
            refuse_not_finite({name: float(self.parts.loss_of(batch)) for name, batch in held.items()})
        self.learn_loss([*held.values()])
        counts = [count_examples(batch) for batch in held.values()]
        self.found_values = sum(counts) if self.independent else len(counts)
        self.parts.warnings.extend(self.notes())

    @property
    def host(self) -> nn.Module:
        """The model."""
        return self.run.morphable.host

    @property
    def training_loss(self) -> float | None:
        """Mean of the latest losses that the loop handed over."""
        return sum(self.losses) / len(self.losses) if self.losses else None

    def collect(self, batch: object, loss: float) -> None:
        """Keep a training batch, and as many before it as an event reads."""
        self.losses.append(loss)
        size = count_examples(batch)
        if self.under_way is not None or not size:
            return
        self.batches.append(copied(batch))
        self.size = max(self.size, size)
        if not self.independent:  # each batch is one value, so it takes as many as there may be
            self.most = max(self.run.config.early.examples, BLOCKS * size)
        elif self.parts.steps is not None:  # a short run's events read less
            share = int(SHARE * self.parts.steps * size)
            self.most = min(max(share, LEAST), self.run.config.early.examples)
        while len(self.batches) > 1 and (len(self.batches) - 1) * size >= self.most:
            self.batches.popleft()

    def probe(self) -> list[object]:
        """Return the held-out examples that an event reads, batch by batch."""
        return list(self.named_probe().values())

    def named_probe(self) -> dict[str, object]:
        """Return the held-out batches by what they are called."""
        with untouched(self.host), same_generators(self.parts.probe):
            alone, seed = self.independent is True, self.parts.seed
            batches, self.empty = held_batches(self.parts.probe, self.most, seed, alone)
        return {f"batch {index} of the probe": batch for index, batch in batches}

    def ready(self, why: str) -> bool:
        """Tell whether the evidence for an event is there."""
        return True

    def due(self) -> str | None:
        """Return why an event came that has waited for its evidence."""
        return None

    def abandon(self) -> None:
        """Gather no more for an event that is skipped."""
        self.read, self.under_way = list[object](), None

    def learn_loss(self, held: Sequence[object]) -> None:
        """Find out once what kind of loss this is."""
        few = first(held[0], 64)
        places = self.run.morphable.places
        if self.parts.per_example is None:
            asked = (independent(self.host, self.loss_of, places, first(one, 64)) for one in held[:ASKED])
            self.independent = next((answer for answer in asked if answer is not None), None)
        else:
            with evaluating(self.host), torch.enable_grad():
                self.independent = followed(self.host, self.loss_of, places, few)
        if self.independent is None:
            with evaluating(self.host), torch.enable_grad(), untouched(self.host, 0):
                self.learns = self.loss_of(few).requires_grad
        with evaluating(self.host):
            self.inner = differentiates(self.host, places, lambda: self.loss_of(few))
        self.saturation.learn(lambda: self.parts.loss_of(few))

    @property
    def step_flops(self) -> int:
        """What a training step costs."""
        return 3 * self.run.morphable.flops * self.size

    @property
    def spread(self) -> bool:
        """Whether a look takes several steps: in one process, and where it would hold the loop up."""
        return self.step_flops >= self.dear and self.run.peers.world == 1

    @property
    def concluding(self) -> bool:
        """Whether a look that is spread has read all, and only its event is left."""
        return self.under_way is not None and self.under_way.spread and self.under_way.complete

    def begin(self, places: Mapping[str, Place], units: Mapping[str, int], spread: bool = False) -> None:
        """Begin to measure places.

        Args:
            places: By name.
            units: To test, by name.
            spread: Whether it may take several steps.
        """
        held, self.read = self.read or self.probe(), list[object]()
        seed = self.parts.streams.draw("evidence")
        self.under_way = Look(self, places, units, held, seed, spread and self.spread)

    def go_on(self) -> Found | None:
        """Measure what is due in this step; None while more is to come."""
        look = self.under_way
        assert look is not None
        if not look.go_on():
            return None
        score, held = look.score, look.held
        score.conclude(self.shared)
        examples = sum(count_examples(batch) for batch in held)
        seen = sum(count_examples(batch) for batch in self.batches)
        often = 3 if self.saturation.fitted is None else 4
        flops = score.flops + self.run.morphable.flops * (often * min(seen, self.most) + 4 * examples)
        self.latest = [*self.batches][-LATEST:]
        self.batches.clear()
        self.under_way = None
        values = examples if look.alone else len(held)
        return Found(score.chosen, look.held_out, values, look.alone, flops, score.failed)

    def fit_of(self, batches: Iterable[object]) -> float | None:
        """Return the mean loss of training examples where it could tell a saturated host, else None.

        What is handed to ``growth.step`` does not: a loop that accumulates gradients divides it. Norms know
        the batch, as in training.
        """
        if self.saturation.guess is None or not batches:
            return None
        with judging(self.host), torch.no_grad(), untouched(self.host, 0):
            return self.mean_of(batches)

    def price(self, places: Mapping[str, Place], units: Mapping[str, int]) -> tuple[int, int]:
        """Return what :meth:`look` will cost at most, and how many held-out examples it reads."""
        held = sum(count_examples(batch) for batch in self.read or self.probe())
        seen = min(sum(count_examples(batch) for batch in self.batches), self.most)
        often = 3 if self.saturation.guess is None else 4
        own = self.run.morphable.flops * (often * seen + 4 * held)
        return own + look_price(places, units, seen, held, self.inner), held

    def runs(self, batches: Sequence[object], alone: bool) -> list[Run]:
        """Return passes over batches: in portions where examples count alone, else as they came."""
        left, runs = self.most, list[Run]()
        for batch in self.laid_out(batches, alone):
            few = first(batch, left if alone else self.most)
            runs.append(((lambda b=few: self.loss_of(b)), count_examples(few)))
            left -= runs[-1][1]
            if alone and left <= 0:
                break
        return runs

    def laid_out(self, batches: Sequence[object], alone: bool | None) -> Iterator[object]:
        """Lay batches out as they are to go through the model."""
        most = self.size if self.spread else largest(self.size, self.run.morphable.flops)
        return portions(batches, most) if alone else iter(batches)

    def loss_of(self, batch: object) -> Tensor:
        """Return the loss that is evidence: the user's, or the mean of what ``per_example`` gives."""
        if self.parts.per_example is None:
            return self.parts.loss_of(batch)
        return self.parts.per_example(self.host, batch).mean()

    @property
    def smallest(self) -> int:
        """The fewest held-out values that could pass."""
        places = max(len(self.run.morphable.places), 1)
        share = Spending(self.run.config.early.false_keep).most
        alone = share if places == 1 else share / 2 / places
        return smallest(alone, of_blocks=self.independent is not True)

    def held_out(self, held: Sequence[object] | None = None) -> float:
        """Return the mean held-out loss in eval mode; rank 0's counts."""
        return self.run.peers.broadcast_floats([self.mean_loss(self.probe() if held is None else held)])[0]

    def mean_loss(self, batches: Sequence[object]) -> float:
        """Return the mean loss of examples in eval mode, in this process."""
        with examining(self.host, 0):
            return self.mean_of(batches)

    def mean_of(self, batches: Iterable[object]) -> float:
        """Return the mean loss of examples in the mode that the host is in."""
        total = examples = 0.0
        for batch in self.laid_out([*batches], self.independent):
            count = count_examples(batch)
            total += float(self.parts.loss_of(batch)) * count
            examples += count
        return total / examples

    def remember(self) -> None:
        """Keep what an event will be judged by: the probe is there again."""

    def judged_on(self) -> list[object]:
        """Return the batches that tell what weights from before an event would lose now."""
        return self.probe()

    def in_hindsight(self, held: Sequence[object], remembered: float) -> float:
        """Return what the weights that the host has for the while lose now, in this process.

        Args:
            held: From ``judged_on``.
            remembered: What they lost at the event.
        """
        return self.mean_loss(held)

    def doubts(self) -> list[str]:
        """Say at the start what would keep anything from passing."""
        if not self.learns:
            return [UNLEARNED]
        if self.parts.example is not None or self.found_values >= self.smallest:
            return []
        what = {True: "examples", False: "batches, whose examples the loss couples", None: UNTOLD}
        more = "hold out more" if self.independent else "hold out more, or pass per_example="
        return [
            f"the probe has {self.found_values} {what[self.independent]}; with fewer than {self.smallest} "
            f"nothing can pass: {more}"
        ]

    def trained_on(self) -> list[str]:
        """Say so, once, where most held-out examples are among those that the loop trains on."""
        self.known.learn(self.batches)
        self.read = self.probe()
        if self.run.peers.all_ranks(not self.known.most_of(self.read)):
            return []
        self.run.tell("warning", message=self.repeats)
        return [self.repeats]

    def notes(self) -> list[str]:
        """Say at the start what is read otherwise than one might think."""
        found = list[str]()
        if self.empty:
            which = ", ".join(map(str, self.empty[:4])) + (" …" if len(self.empty) > 4 else "")
            found.append(
                f"of the probe batch {which} is left out: its targets are all -100, which losses ignore"
            )
        if self.independent is None and not self.doubts():
            found.append(f"held-out evidence is {UNTOLD}; pass per_example= to count examples")
        return found

    def enough(self, held_out: float, learned: float) -> str:
        """Say so where a host that has not grown has room."""
        return self.saturation.enough(held_out, learned)

    def state_dict(self) -> EvidenceState:
        """Return what was kept for the next event."""
        return {
            "batches": list(self.batches),
            "losses": list(self.losses),
            "most": self.most,
            "size": self.size,
            "look": None if self.under_way is None else self.under_way.state_dict(),
        }

    def load_state_dict(self, state: EvidenceState) -> None:
        """Go on."""
        self.batches.extend(state["batches"])
        self.losses.extend(state["losses"])
        self.most, self.size = state["most"], state.get("size", 0)
        look = state.get("look")
        if look is not None:
            self.under_way = Look.from_state(look, self, self.probe())
