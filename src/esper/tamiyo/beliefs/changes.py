"""Has the world changed? A cumulative sum of surprises (Page 1954), and where the change began."""

from __future__ import annotations

SLACK = 0.5  # surprise that is forgiven at every observation, of 1 expected
MOST = 9.0  # one outlier counts as three standard deviations: it raises no alarm of its own


class Cusum:
    """Adds up how much more surprising observations are than they should be.

    Where nothing has changed the squares of standardised residuals have mean 1 and the sum keeps falling back
    to 0. The observations since it last was 0 are those of the changed world.

    Args:
        threshold: Sum at which a change is told; two observations of three deviations are 15.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.sum = 0.0
        self.since = 0  # observations since it was 0

    def tells(self, surprise: float) -> bool:
        """Take in one squared standardised residual; tell whether the world has changed."""
        self.sum = max(0.0, self.sum + min(surprise, MOST) - 1 - SLACK)
        self.since = self.since + 1 if self.sum else 0
        return self.sum > self.threshold
