"""Check the plain arguments of ``grow`` before anything is touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from esper.errors import ConfigError

MOST_STEPS = 10**8  # of a run


def listed(schedulers: object) -> list[Any]:
    """Return the schedulers in a list; one that is given alone is meant.

    Raises:
        ConfigError: What is given has no ``step``.
    """
    given = list(schedulers) if isinstance(schedulers, Sequence) else [schedulers]
    for one in given:
        if not callable(getattr(one, "step", None)):
            raise ConfigError(
                f"schedulers={schedulers!r}: a {type(one).__name__} has no step(); give schedulers in a "
                "list, or leave it out"
            )
    return given


def refuse_numbers(steps: object, seed: object) -> None:
    """Refuse a number of steps that no run has, and a seed that is none.

    Raises:
        ConfigError: With what was given.
    """
    whole = isinstance(steps, int) and not isinstance(steps, bool)
    if steps is not None and not (whole and 1 <= steps <= MOST_STEPS):
        raise ConfigError(f"steps={steps!r}; give the optimizer steps of the run, a count from 1 on, or None")
    if not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed={seed!r}; give a whole number that is not negative")
