"""The gate between incubation and exposure: a kernel may touch the model only on held-out evidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import IterableDataset

from esper.batches.examples import LossFunction, example_losses
from esper.config import Gate as GateSettings
from esper.distributed.collectives import ALONE, Peers
from esper.errors import ProbeError
from esper.kasmina.evidence.e_values import weight_of_evidence
from esper.kasmina.seeds.layer import KasminaLayer
from esper.surgery.isolation.contexts import examining, same_generators, same_randomness, untouched


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one look found."""

    passed: bool
    look: int
    e_value: float  # at most 1/p of the mean
    threshold: float
    gain: float | None  # mean held-out loss without minus with the kernel
    loss: float | None  # held-out, without
    examples: int
    reason: str


class Gate:
    """Counts looks and spends the run's false-keep budget evenly over them.

    Args:
        model: The host.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        probe: Held-out batches, re-iterable.
        settings: False-keep budget and smallest gain.
        looks: How many looks share the budget.
        on_fallback: Told why examples ran one by one.
        peers: Other processes; what rank 0 finds counts, so give all of them the same probe.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        probe: Iterable[Any],
        settings: GateSettings,
        looks: int,
        on_fallback: Callable[[str, str], None],
        peers: Peers = ALONE,
    ) -> None:
        self.model, self.loss_fn, self.probe, self.settings = model, loss_fn, probe, settings
        self.on_fallback, self.peers = on_fallback, peers
        self.allowed, self.looks = looks, 0

    def look(self, layer: KasminaLayer, kernel: nn.Module, train: Any, seed: int) -> Verdict:
        """Test one kernel at full strength against the host as it is.

        Args:
            layer: The site, seams open.
            kernel: The race's winner.
            train: A training batch; scale and stake of the bet are taken from it.
            seed: Of the random numbers that both passes share.
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
        threshold = self.allowed / self.settings.false_keep
        rehearsal = self.differences(layer, kernel, [train], seed)[0]
        differences, losses = self.differences(layer, kernel, self.probe, seed)
        weight = weight_of_evidence(differences, rehearsal)
        found = float(differences.mean()), float(losses.mean()), weight
        gain, loss, value = self.peers.agree(found)
        if not math.isfinite(gain):
            reason = "the held-out loss is not finite"
        elif gain <= 0:
            reason = "no gain on held-out examples"
        elif gain < self.settings.min_gain * abs(loss):
            reason = f"the gain is below {self.settings.min_gain:.1%} of the held-out loss"
        elif value < threshold:
            reason = "the held-out gain may be chance"
        else:
            reason = "held-out evidence"
        passed = reason == "held-out evidence"
        return Verdict(passed, self.looks, value, threshold, gain, loss, len(differences), reason)

    def differences(
        self, layer: KasminaLayer, kernel: nn.Module, batches: Iterable[Any], seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return, per example, the loss without minus with the kernel, and the loss without."""
        found: list[np.ndarray] = []
        without: list[np.ndarray] = []
        with examining(self.model):
            for batch in batches:
                off = self.losses(layer, None, batch, seed)
                found.append(off - self.losses(layer, kernel, batch, seed))
                without.append(off)
        if not found:
            raise ProbeError(
                "the probe held no batch; give batches kept out of training that can be iterated again"
            )
        return np.concatenate(found), np.concatenate(without)

    def losses(self, layer: KasminaLayer, kernel: nn.Module | None, batch: Any, seed: int) -> np.ndarray:
        """Return the held-out loss of every example."""
        with untouched(self.model, seed), layer.showing(kernel):
            losses, together = example_losses(self.model, self.loss_fn, batch)
        if not together:
            self.on_fallback(
                "evidence", "the model or loss does not run under vmap; examples were run one by one"
            )
        return losses.double().cpu().numpy()


def check_probe(probe: Any) -> None:
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
