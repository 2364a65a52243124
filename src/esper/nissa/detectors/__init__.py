"""Detectors: what is told from a run's vital signs. The file's name is the detector's name.

The governor asks the one that ``governor.detector`` names at every step; alerts may ask the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from esper.errors import EsperError, RegistryError
from esper.printable import raised
from esper.registry import Registry

Kind = Literal["nonfinite", "spike", "divergence", "rate", "leak", "harm"]


@dataclass(frozen=True, slots=True)
class Vitals:
    """One step's vital signs; None is not read."""

    loss: float
    gradient: float | None = None  # norm over everything the optimizers step, scaled up where a part was read
    weights: bool | None = None  # whether those that were read are finite
    rate: float | None = None  # the largest learning rate


@dataclass(frozen=True, slots=True)
class Finding:
    """Something a test found; ``expected`` says why it is no alarm, where it is none."""

    kind: Kind
    signal: str  # "loss", "gradient", "weights", "rate"
    step: int
    value: float | None  # None: not finite
    usual: float | None
    size: float | None  # in the test's own unit
    since: int  # first step with evidence; a way back leads before it
    expected: str = ""
    what: str = ""  # of a seed's misconduct, in words

    def __str__(self) -> str:
        """Say it in a line."""
        if self.what:
            return f"{self.kind}: {self.what}, found at step {self.step}"
        value = "not finite" if self.value is None else f"{self.value:.4g}"
        usual = "" if self.usual is None else f", usually {self.usual:.4g}"
        why = f" (expected: {self.expected})" if self.expected else ""
        return f"{self.kind}: {self.signal} is {value}{usual} at step {self.step}{why}"


class Detector(Protocol):
    """Looks at one step's vital signs after another: no clock, no randomness."""

    def look(self, vitals: Vitals, step: int) -> Finding | None:
        """Return the gravest finding of a step; a value that is not finite is one always.

        Args:
            vitals: Of the step.
            step: Its number; it never falls but behind :meth:`forget`.
        """

    def expect(self, step: int, why: str, steps: int, excused: float = ...) -> None:
        """Annotate findings instead of raising an alarm, until ``step + steps``.

        Args:
            step: When the discontinuity begins.
            why: What findings are annotated with.
            steps: How long it may show.
            excused: e-folds above anything recent that stay an alarm.
        """

    def doubts(self) -> bool:
        """Tell whether something may be wrong that is no finding yet: no snapshot is taken meanwhile."""

    def forget(self) -> None:
        """Start afresh after a way back or a change of topology."""

    def state_dict(self) -> Mapping[str, object]:
        """Return everything that a later finding depends on, as JSON values."""

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on looking."""


DETECTORS: Registry[Callable[[], Detector]] = Registry("esper.nissa.detectors", "esper.detectors")
ASKED = ("look", "expect", "doubts", "forget", "state_dict", "load_state_dict")


def begun(name: str) -> Detector:
    """Make the detector of a name.

    Raises:
        RegistryError: There is none, or another package's cannot be made, or lacks a method.
    """
    made_by = DETECTORS.get(name)
    try:
        made = made_by()
    except Exception as error:  # another package's code raises what it likes
        raise RegistryError(f"the detector {name} cannot be made: {raised(error)}") from error
    if lacking := [method for method in ASKED if not callable(getattr(made, method, None))]:
        raise RegistryError(f"the detector {name} has no {', '.join(lacking)}; see esper.testing.detectors")
    return made


def looked(detector: Detector, name: str, vitals: Vitals, step: int) -> Finding | None:
    """Let a detector look at a step.

    Raises:
        RegistryError: It failed; a run that is to be watched does not go on unwatched.
    """
    try:
        finding = detector.look(vitals, step)
    except EsperError:
        raise
    except Exception as error:  # another package's code raises what it likes
        raise RegistryError(f"the detector {name} failed at step {step}: {raised(error)}") from error
    if finding is not None and not isinstance(finding, Finding):
        raise RegistryError(
            f"the detector {name} found a {type(finding).__name__}; a Finding or None is needed"
        )
    return finding
