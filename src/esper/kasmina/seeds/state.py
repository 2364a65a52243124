"""``KasminaStateLayout``: the state of a model's seeds as parallel tensors, and the table of legal moves.

Structure of arrays: one tensor per field, one row per seed, so that a step costs the same few torch calls
however many seeds there are; ``benchmarks/state_layout.py`` measures it against a list of objects. The layout
travels in the checkpoint.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from esper.contracts import Stage
from esper.errors import ConfigError, TransitionError

MOVES: dict[Stage, frozenset[Stage]] = {
    Stage.DORMANT: frozenset({Stage.GERMINATED}),
    Stage.GERMINATED: frozenset(
        {Stage.TRAINING, Stage.STABILISING, Stage.CULLED, Stage.ERROR, Stage.ROLLED_BACK}
    ),
    Stage.TRAINING: frozenset({Stage.GRAFTING, Stage.CULLED, Stage.ERROR, Stage.ROLLED_BACK}),
    Stage.GRAFTING: frozenset({Stage.STABILISING, Stage.CULLED, Stage.ERROR, Stage.ROLLED_BACK}),
    Stage.STABILISING: frozenset({Stage.EVALUATING, Stage.CULLED, Stage.ERROR, Stage.ROLLED_BACK}),
    Stage.EVALUATING: frozenset({Stage.FOSSILISED, Stage.CULLED, Stage.ERROR, Stage.ROLLED_BACK}),
    Stage.FOSSILISED: frozenset({Stage.DORMANT}),  # the pair is wider and the slot is free again
    Stage.CULLED: frozenset({Stage.EMBARGOED}),
    Stage.EMBARGOED: frozenset({Stage.DORMANT}),
    Stage.ERROR: frozenset({Stage.CULLED}),
    Stage.ROLLED_BACK: frozenset({Stage.CULLED}),
}
AWAKE = frozenset({Stage.GERMINATED, Stage.TRAINING, Stage.GRAFTING, Stage.STABILISING, Stage.EVALUATING})

# Rows of ``vitals``: variance of a kernel's output, norm of its gradient, share of dead units, seconds a call
# takes.
VITALS = ("variance", "gradient", "dead", "latency")
END = 1e-6  # an α that near to 0 or 1 is there: steps of a ramp are rounded


class KasminaStateLayout(nn.Module):
    """State of ``seeds`` seeds.

    Args:
        seeds: Number of rows.
        smoothing: Weight of a new sample in the smoothed fields, in (0, 1].
        sampling: Vitals are measured on every ``sampling``-th step.

    Raises:
        ConfigError: A setting is out of range.
    """

    stage: Tensor  # (seeds,) uint8
    alpha: Tensor  # (seeds,) float32, on the model's device
    slope: Tensor  # (seeds,) float64: alpha's change per tick; 0 where it stays
    vitals: Tensor  # (len(VITALS), seeds) float32, smoothed; NaN is not measured
    gain: Tensor  # (seeds,) float32, smoothed; NaN is not measured
    faults: Tensor  # (seeds,) int32
    changed: Tensor  # (seeds,) int64, step of the last move

    def __init__(self, seeds: int, smoothing: float = 0.1, sampling: int = 10) -> None:
        super().__init__()
        if not 0 < smoothing <= 1 or sampling < 1:
            raise ConfigError(
                f"smoothing must be in (0, 1] and sampling at least 1, got {smoothing} and {sampling}"
            )
        self.smoothing, self.sampling = smoothing, sampling
        self.register_buffer("stage", torch.zeros(seeds, dtype=torch.uint8))
        self.register_buffer("alpha", torch.zeros(seeds))
        self.register_buffer("slope", torch.zeros(seeds, dtype=torch.float64))
        self.register_buffer("vitals", torch.full((len(VITALS), seeds), math.nan))
        self.register_buffer("gain", torch.full((seeds,), math.nan))
        self.register_buffer("faults", torch.zeros(seeds, dtype=torch.int32))
        self.register_buffer("changed", torch.zeros(seeds, dtype=torch.int64))
        self.lock = threading.RLock()

    def stage_of(self, seed: int) -> Stage:
        """Return a seed's stage."""
        return Stage(int(self.stage.numpy()[seed]))  # the same memory, without torch's indexing (5 µs)

    def move(self, seed: int, source: Stage, target: Stage, step: int) -> None:
        """Move a seed, compare-and-set.

        Raises:
            TransitionError: The seed is not in ``source``, or the table has no such move.
        """
        with self.lock:
            now = self.stage_of(seed)
            if now is not source:
                raise TransitionError(
                    f"seed {seed} is {now.name}, not {source.name}; it was not moved to {target.name}"
                )
            if target not in MOVES[source]:
                allowed = ", ".join(sorted(s.name for s in MOVES[source]))
                raise TransitionError(
                    f"seed {seed} cannot go from {source.name} to {target.name}; from there: {allowed}"
                )
            self.stage.numpy()[seed] = int(target)
            self.changed.numpy()[seed] = step

    def ramp(self, seed: int, steps: int) -> None:
        """Let a seed's α go to 1 within ``steps`` ticks, to 0 within ``-steps`` of them; 0 holds it."""
        with self.lock:
            self.slope.numpy()[seed] = 1 / steps if steps else 0.0

    def tick(self) -> None:
        """Move every seed's α one step along its ramp; rounding leaves the end within ``END``."""
        with self.lock:
            near = self.alpha.cpu()  # itself, or one copy from the device for all seeds
            self.alpha.copy_(near.add_(self.slope).clamp_(0, 1))

    def ramping(self, seed: int) -> bool:
        """Tell whether a seed's α is on its way."""
        return bool(self.slope.numpy()[seed])

    def due(self, step: int) -> bool:
        """Tell whether vitals are measured on this step."""
        return step % self.sampling == 0

    def observe(self, samples: Tensor) -> None:
        """Smooth new vitals of all seeds at once; a row's first sample stands as it is.

        Args:
            samples: (len(VITALS), seeds), float32 or float64; NaN where nothing was measured, which changes
                nothing there.
        """
        with self.lock:
            old = self.vitals.numpy()  # the same memory; torch's masked operations take twice as long
            new = samples.detach().cpu().numpy()  # one copy from the device for all seeds
            np.copyto(old, new, where=np.isnan(old), casting="same_kind")
            with np.errstate(invalid="ignore"):  # infinite less infinite: not measured, until the next sample
                change = new - old
                np.copyto(change, 0.0, where=np.isnan(change))
                old += self.smoothing * change

    def observe_seed(self, seed: int, **measured: float) -> None:
        """Smooth new vitals of one seed, by name.

        Raises:
            ConfigError: No vital has that name.
        """
        if unknown := measured.keys() - set(VITALS):
            raise ConfigError(f"no vital {', '.join(sorted(unknown))}; known: {', '.join(VITALS)}")
        samples = torch.full(self.vitals.shape, math.nan, dtype=torch.float64)
        samples[:, seed] = torch.tensor([measured.get(name, math.nan) for name in VITALS])
        self.observe(samples)

    def vitals_of(self, seed: int) -> dict[str, float | None]:
        """Return a seed's smoothed vitals by name; None is not measured."""
        with self.lock:
            values = self.vitals[:, seed].tolist()
        return {name: None if math.isnan(v) else v for name, v in zip(VITALS, values, strict=True)}

    def health_score(self, seed: int) -> float | None:
        """Return how well a kernel works, for display only: no decision reads it.

        It is the share of living units over one plus the faults, ``(1 - dead) / (1 + faults)``, and 0 where
        the output does not vary, no gradient arrives, or either has gone infinite. Latency has no say: slow
        is not ill.

        Returns:
            A number in [0, 1], or None while one of the three parts is not measured.
        """
        with self.lock:
            vitals, faults = self.vitals_of(seed), int(self.faults[seed])
        variance, gradient, dead = vitals["variance"], vitals["gradient"], vitals["dead"]
        if variance is None or gradient is None or dead is None:
            return None
        working = 0 < variance < math.inf and 0 < gradient < math.inf
        return (1 - dead) / (1 + faults) if working else 0.0

    def observe_gain(self, seed: int, gain: float) -> None:
        """Smooth a newly measured gain; the first sample stands as it is."""
        with self.lock:
            old = self.gain[seed]
            self.gain[seed] = gain if old.isnan() else old + self.smoothing * (gain - old)

    def add_fault(self, seed: int) -> int:
        """Count a fault and return how many there are."""
        with self.lock:
            self.faults[seed] += 1
            return int(self.faults[seed])

    def clear(self, seed: int) -> None:
        """Forget everything about a seed but its stage."""
        with self.lock:
            self.alpha[seed] = 0.0
            self.slope.numpy()[seed] = 0.0
            self.vitals.numpy()[:, seed] = math.nan
            self.gain.numpy()[seed] = math.nan
            self.faults.numpy()[seed] = 0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KasminaStateLayout:
        """Follow the model to another device, but never to another dtype: an α in bf16 has 8 bits."""
        self.alpha = self.alpha.to(fn(torch.empty(0)).device)
        return self

    def __getstate__(self) -> dict[str, object]:
        """Leave the lock behind."""
        return {key: value for key, value in self.__dict__.items() if key != "lock"}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take a lock of one's own."""
        super().__setstate__(state)
        self.lock = threading.RLock()
