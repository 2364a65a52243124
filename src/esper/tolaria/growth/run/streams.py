"""Separate random streams, so that one more look at the evidence does not change what is grown next."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

NAMES = ("policy", "initialisation", "evidence")


class Streams:
    """Named generators from one seed; the data's order is the user's own stream.

    Args:
        seed: Same seed, same lineage.
    """

    def __init__(self, seed: int) -> None:
        children = np.random.SeedSequence(seed).spawn(len(NAMES))
        self.generators = {
            name: np.random.default_rng(child) for name, child in zip(NAMES, children, strict=True)
        }

    def draw(self, name: str) -> int:
        """Draw a seed for torch from a stream."""
        return int(self.generators[name].integers(2**31))

    def state_dict(self) -> dict[str, Mapping[str, object]]:
        """Return every generator's state."""
        return {name: generator.bit_generator.state for name, generator in self.generators.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, object]]) -> None:
        """Go on drawing."""
        for name, generator in self.generators.items():
            generator.bit_generator.state = state[name]
