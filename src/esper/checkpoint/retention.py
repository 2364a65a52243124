"""Which checkpoints to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

from esper.checkpoint.format.manifest import Manifest
from esper.errors import ConfigError

Best: TypeAlias = tuple[str, Literal["min", "max"]]


class Retention:
    """Keeps the newest sound checkpoints and the best one.

    Args:
        keep: Number of the newest that stay; None keeps all.
        best: A metric's name, and whether less of it (``"min"``) or more is better; None: there is no best.

    Raises:
        ConfigError: ``keep`` is below 1: the newest sound checkpoint is never deleted.
    """

    def __init__(self, keep: int | None, best: Best | None = None) -> None:
        if keep is not None and (not isinstance(keep, int) or isinstance(keep, bool)):
            raise ConfigError(f"keep {keep!r} checkpoints: a whole number is needed, or None for all of them")
        if best is not None and (isinstance(best, str) or len(best) != 2):
            raise ConfigError(f"best {best!r}: a metric and 'min' or 'max' are needed, as in ('loss', 'min')")
        if keep is not None and keep < 1:
            raise ConfigError(f"keep {keep} checkpoints: at least 1, the newest sound one, is always kept")
        if best is not None and best[1] not in ("min", "max"):
            raise ConfigError(f"best {best[1]!r} of {best[0]!r}: it must be 'min' or 'max'")
        self.keep, self.best = keep, best

    def superfluous(self, names: Sequence[str], sound: Mapping[str, Manifest]) -> list[str]:
        """Return what to delete, oldest first.

        Args:
            names: Names of all checkpoints, sorted by step.
            sound: Manifests of those that verify. Damaged ones go once they are older than all that is kept.
        """
        if self.keep is None or not sound:
            return []
        newest = [name for name in names if name in sound][-self.keep :]
        kept = {*newest, self.best_of(sound)}
        return [name for name in names[: names.index(newest[0])] if name not in kept]

    def best_of(self, sound: Mapping[str, Manifest]) -> str | None:
        """Return the best checkpoint's name; of equals the newest; None where none has the metric."""
        if self.best is None:
            return None
        metric, sense = self.best
        scores = {
            name: value if sense == "max" else -value
            for name, manifest in sound.items()
            if (value := manifest.metrics.get(metric)) is not None
        }
        return max(scores, key=lambda name: (scores[name], name), default=None)
