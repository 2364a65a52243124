"""The gate between incubation and exposure: a kernel may touch the model only on held-out evidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from esper.batches.examples import LossFunction, count_examples, example_losses
from esper.batches.layout import Batch, flatten, rows
from esper.config import Gate as GateSettings
from esper.distributed.collectives import ALONE, Peers
from esper.errors import ProbeError
from esper.kasmina.evidence.e_values import weight_of_evidence
from esper.kasmina.evidence.significance import smallest
from esper.kasmina.race.worth import ALONE_EACH, Worth, blocks, counted
from esper.kasmina.seeds.layer import KasminaLayer
from esper.surgery.isolation.contexts import examining, same_generators, same_randomness, untouched

Charged: TypeAlias = Callable[..., AbstractContextManager[None]]
MOST = 2048  # examples that a look reads of a probe that does not say how many it has


def uncharged(*what: Hashable) -> AbstractContextManager[None]:
    """Let a pass run that is metered around this, or not at all."""
    return nullcontext()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one look found."""

    passed: bool
    look: int
    e_value: float  # at most 1/p of the mean
    threshold: float
    gain: float | None  # mean held-out loss without minus with the kernel
    loss: float | None  # held-out, without
    examples: int  # held-out values: examples, or blocks of them
    reason: str


class Gate:
    """Counts looks and spends the run's false-keep budget evenly over them.

    Args:
        model: The host.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        probe: Held-out batches, re-iterable.
        settings: False-keep budget and smallest gain.
        looks: Number of looks that share the budget.
        on_fallback: Function that is told why examples ran one by one.
        peers: Other processes; what rank 0 finds counts, so give all of them the same probe.
        worth: Kind of one value of evidence: an example, or a block.

    Attributes:
        size: Examples in a batch of the loop, of which blocks are made; None before the first look.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        probe: Iterable[Batch],
        settings: GateSettings,
        looks: int,
        on_fallback: Callable[[str, str], None],
        peers: Peers = ALONE,
        worth: Worth = ALONE_EACH,
    ) -> None:
        self.model, self.loss_fn, self.probe, self.settings = model, loss_fn, probe, settings
        self.on_fallback, self.peers, self.worth = on_fallback, peers, worth
        self.allowed, self.looks = looks, 0
        self.size: int | None = None
        self.values: int | None = None  # that the probe has, once it was counted
        self.told = set[str]()  # why examples ran one by one, by what was raised

    @property
    def threshold(self) -> float:
        """The weight that evidence must have at each look."""
        return self.allowed / self.settings.false_keep

    @property
    def fewest(self) -> int:
        """The fewest held-out values that could pass."""
        return smallest(1 / self.threshold, of_blocks=not self.worth.alone)

    def too_few(self, size: int) -> str:
        """Say that the probe has fewer values than could ever pass; "" where it has enough.

        Args:
            size: Examples in a batch of the loop, of which blocks are made.
        """
        if self.values is None:
            self.size = size
            with same_randomness(), same_generators(self.probe):
                alone = self.worth.alone
                self.values = sum(count_examples(one) if alone else 1 for one in self.parts(self.probe))
        if self.values >= self.fewest:
            return ""
        more = "hold out more" if self.worth.alone else "hold out more, or pass per_example="
        what = self.worth.named.removesuffix(",")
        return f"the probe has {self.values} {what}; with fewer than {self.fewest} nothing can pass: {more}"

    def look(
        self,
        layer: KasminaLayer,
        kernel: nn.Module,
        train: Sequence[Batch],
        seed: int,
        charged: Charged = uncharged,
    ) -> Verdict:
        """Test one kernel at full strength against the host as it is.

        Args:
            layer: The site, seams open.
            kernel: The race's winner.
            train: Training batches; scale and stake of the bet are taken from the last, or where a batch is
                one value from all.
            seed: Seed of the random numbers that both passes share.
            charged: Function of what the cost of a pass depends on; the pass runs in what it returns.
        """
        if self.looks >= self.allowed:
            return Verdict(
                False,
                self.looks,
                0.0,
                math.inf,
                None,
                None,
                0,
                "every look of the false-keep budget is spent",
            )
        self.looks += 1
        self.size = count_examples(train[-1])
        rehearsal = self.differences(layer, kernel, train[-1:] if self.worth.alone else train, seed, charged)[
            0
        ]
        differences, losses = self.differences(layer, kernel, self.probe, seed, charged)
        weight = weight_of_evidence(differences, rehearsal, blocks=not self.worth.alone)
        found = float(differences.mean()), float(losses.mean()), weight
        gain, loss, value = self.peers.broadcast_floats(found)
        if not math.isfinite(gain):
            reason = "the held-out loss is not finite"
        elif gain <= 0:
            reason = "no gain on held-out examples"
        elif gain < self.settings.min_gain * abs(loss):
            reason = f"the gain is below {self.settings.min_gain:.1%} of the held-out loss"
        elif value < self.threshold and len(differences) < self.fewest:
            reason = f"{len(differences)} {self.worth.named} are too few to tell; {self.fewest} could pass"
        elif value < self.threshold:
            reason = "the held-out gain may be chance"
        else:
            reason = "held-out evidence"
        passed = reason == "held-out evidence"
        return Verdict(passed, self.looks, value, self.threshold, gain, loss, len(differences), reason)

    def differences(
        self,
        layer: KasminaLayer,
        kernel: nn.Module,
        batches: Iterable[Batch],
        seed: int,
        charged: Charged = uncharged,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return, value by value, the loss without minus with the kernel, and the loss without."""
        found: list[np.ndarray] = []
        without: list[np.ndarray] = []
        with examining(self.model), same_generators(batches):
            for batch in self.parts(batches):
                with charged("host", *shapes(batch)):
                    off = self.losses(layer, None, batch, seed)
                with charged("kernel", *shapes(batch)):
                    found.append(off - self.losses(layer, kernel, batch, seed))
                without.append(off)
        if not found:
            raise ProbeError(
                "the probe held no batch; give batches kept out of training that can be iterated again"
            )
        return np.concatenate(found), np.concatenate(without)

    def parts(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Give the batches as they are judged, without rows that no loss counts."""
        read = counted(bounded(batches))
        if self.worth.alone or not self.worth.cut or self.size is None:
            yield from read
        else:
            yield from blocks(read, self.size)

    def losses(self, layer: KasminaLayer, kernel: nn.Module | None, batch: Batch, seed: int) -> np.ndarray:
        """Return the held-out loss of every example, or the one of the block."""
        why = ""
        with untouched(self.model, seed), layer.showing(kernel):
            if self.worth.per_example is not None:
                losses = self.worth.per_example(self.model, batch)
            elif self.worth.alone:
                losses, why = example_losses(self.model, self.loss_fn, batch)
            else:
                losses = self.loss_fn(self.model, batch).reshape(1)
        if why and (kind := why.partition(":")[0]) not in self.told:
            self.told.add(kind)
            self.on_fallback(
                "evidence",
                f"the model or loss did not run under vmap ({why}); examples were run one by one, "
                f"{len(losses)} passes in place of one",
            )
        return losses.double().cpu().numpy()


def shapes(batch: Batch) -> list[Hashable]:
    """Return what tells batches apart that cost another number of FLOPs.

    A pass that is metered runs all its operations through Python, one by one; where examples run one after
    the other this was most of what a race took.
    """
    return [tuple(leaf.shape) if isinstance(leaf, Tensor) else rows(leaf) for leaf in flatten(batch)[0]]


def bounded(probe: Iterable[Batch]) -> Iterator[Batch]:
    """Read a probe: to its end, or where it may have none so many examples of it."""
    given = getattr(probe, "given", probe)  # a probe whose batches are changed on the way
    try:
        ends = len(given) >= 0  # pyrefly: ignore  # asked, not assumed
    except TypeError:
        ends = False
    count = 0
    for batch in probe:
        yield batch
        count += count_examples(batch)
        if not ends and count >= MOST:
            return


def check_probe(probe: object) -> None:
    """Refuse a probe that is empty or can be read only once.

    Raises:
        ProbeError: With what was given and what is needed.
    """
    if isinstance(probe, Iterator):
        raise ProbeError(
            f"the probe is a one-shot {type(probe).__name__}; "
            "give a list of batches or a DataLoader, which can be read again"
        )
    if not isinstance(probe, Iterable):
        raise ProbeError(
            f"the probe is a {type(probe).__name__}; give a list of held-out batches or a DataLoader"
        )
    source = getattr(probe, "dataset", probe)
    if isinstance(source, IterableDataset) and iter(source) is iter(source):
        raise ProbeError(
            f"the probe reads a one-shot {type(source).__name__}: its __iter__ returns the same iterator "
            "each time; return a new one, or give a list of batches"
        )
    with same_randomness(), same_generators(probe):  # a DataLoader draws from both
        try:
            found = next(iter(probe), None)
        except Exception as error:  # the user's data set is read here
            raise ProbeError(f"the probe cannot be read: {type(error).__name__}: {error}") from error
    if found is None:
        raise ProbeError("the probe is empty; growth needs held-out batches as evidence")
