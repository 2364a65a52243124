"""What cross-entropy tells of a host: that it learns all there is by itself, or fits what it trains on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from esper.kasmina.evidence.reopen import SATURATED, TEMPER, How, guess, multipliable, output_layers
from esper.surgery.isolation.contexts import evaluating, untouched

ENOUGH = "already wide enough"
SURE = 0.16  # of the learning: before it a host tells by being below early.enough in proportion


class Saturation:
    """Compares losses with that of a guess.

    Args:
        host: The model.
        least: Share of a guess's loss below which a host has room.

    Attributes:
        outputs: The output layer, in a list; empty where there is none.
        guess: The loss of equal logits where the loss is cross-entropy.
        fitted: Mean loss of the training examples of the latest event, by Esper's own pass.
    """

    def __init__(self, host: nn.Module, least: float) -> None:
        self.host, self.least = host, least
        self.outputs: list[nn.Module] = []
        self.guess: float | None = None
        self.fitted: float | None = None

    @property
    def temper(self) -> float:
        """What logits are multiplied by for the score."""
        return TEMPER if self.guess is not None else 1.0

    def learn(self, run: Callable[[], Tensor]) -> None:
        """Find out whether the loss is cross-entropy, by a pass to it."""
        with evaluating(self.host), untouched(self.host, 0):
            self.outputs = output_layers(self.host, run)
            self.guess = guess(self.outputs, run)

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
        share, least = held_out / self.guess, self.least
        told = f"its held-out loss is {share:.1%} of a guess's"
        if share < least:
            return f"{ENOUGH}: {told}"
        return f"it learns fast by itself: {told}" if share * learned < least * SURE else ""

    def saturated(self) -> bool:
        """Tell whether the loss is cross-entropy and nearly satisfied on what the host trains on."""
        guess, training = self.guess, self.fitted
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
