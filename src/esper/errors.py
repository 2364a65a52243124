"""Every error Esper raises.

EsperError
├── ConfigError          (ValueError)    a setting is unknown or out of range
├── RegistryError        (LookupError)   a name is not in its folder
├── MissingExtraError    (ImportError)   an optional package is needed; the message is its pip line
├── SiteError            (ValueError)    no place to grow, or a place that cannot
├── ProbeError           (ValueError)    the held-out batches are empty, one-shot or do not run
├── LossError            (ValueError)    the loss is not a finite scalar
├── OptimizerError       (ValueError)    the optimizer does not own the model's parameters
├── BlueprintError       (ValueError)    a graph is not valid, or does not fit a place
├── KernelError          (ValueError)    a kernel's container is damaged, unsigned or not what it says
├── CompileError         (RuntimeError)  a pipeline could not compile a kernel, or what it made is wrong
├── ForgeError           (RuntimeError)  a background compilation died, ran out of its limits or was cancelled
├── TransitionError      (RuntimeError)  a seed was asked for a move its stage forbids
├── SurgeryError         (RuntimeError)  a widening could not be carried out; everything was put back
├── FinishedError        (RuntimeError)  the run is over
├── ProcessError         (RuntimeError)  the processes of a run hold different models, or one of them is lost
├── StateError           (ValueError)    a saved state does not fit
│   ├── SavedModelError                  a saved folder is damaged or does not fit the model
│   ├── CheckpointError                  a checkpoint is damaged, or cannot be kept
│   └── StoreError                       a store does not answer, or refuses
└── RunError             (ValueError)    a run folder is missing or damaged
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from esper.printable import printable, quoted, shortened

MOST_SAID = 20_000  # characters of a message; a damaged file can hold more names than anybody reads
LONGEST = 200  # characters of what was asked; comparing takes time for each of them
MOST_KNOWN = 100  # names listed as what exists


class EsperError(Exception):
    """Root of the tree; its message says what was asked, what exists and what to do."""

    def __str__(self) -> str:
        """Return the message; what it quotes may come from anywhere, so nothing in it moves a terminal."""
        return printable(shortened(super().__str__(), MOST_SAID))


class ConfigError(EsperError, ValueError):
    """A setting is unknown or out of range."""


class RegistryError(EsperError, LookupError):
    """A name is not in its folder."""


class MissingExtraError(EsperError, ImportError):
    """An optional package is needed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}; install it with: pip install 'esper-morph[{extra}]'")
        self.package, self.extra, self.purpose = package, extra, purpose

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str, str]]:
        """Survive pickling, by which errors travel between processes."""
        return type(self), (self.package, self.extra, self.purpose)


class SiteError(EsperError, ValueError):
    """No place to grow, or a place that cannot."""


class ProbeError(EsperError, ValueError):
    """The held-out batches are empty, one-shot or do not run."""


class LossError(EsperError, ValueError):
    """The loss is not a finite scalar."""


class OptimizerError(EsperError, ValueError):
    """The optimizer does not own the model's parameters."""


class BlueprintError(EsperError, ValueError):
    """A graph is not valid, or does not fit a place; the message names the node."""


class KernelError(EsperError, ValueError):
    """A kernel's container is damaged, unsigned or not what it says."""


class CompileError(EsperError, RuntimeError):
    """A pipeline could not compile a kernel, or what it made is wrong."""


class ForgeError(EsperError, RuntimeError):
    """A background compilation died, ran out of its limits or was cancelled."""


class TransitionError(EsperError, RuntimeError):
    """A seed was asked for a move its stage forbids."""


class SurgeryError(EsperError, RuntimeError):
    """A widening could not be carried out; everything was put back."""


class ProcessError(EsperError, RuntimeError):
    """The processes of a run hold different models, or one of them is lost."""


class FinishedError(EsperError, RuntimeError):
    """The run is over."""


class StateError(EsperError, ValueError):
    """A saved state does not fit."""


class SavedModelError(StateError):
    """A saved folder is damaged or does not fit the model."""


class CheckpointError(StateError):
    """A checkpoint is damaged, or cannot be kept; who looks for a sound one steps back past it."""


class StoreError(StateError):
    """A store does not answer, or refuses; nothing is known of what it holds, so nobody steps back."""


class RunError(EsperError, ValueError):
    """A run folder is missing or damaged."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which of ``known`` was probably meant, as the end of an error message."""
    names = sorted(known)
    close = difflib.get_close_matches(name[:LONGEST], names, n=1)
    hint = f"did you mean {quoted(close[0])}? " if close else ""
    more = f" and {len(names) - MOST_KNOWN} more" if len(names) > MOST_KNOWN else ""
    return f"{hint}known: {', '.join(names[:MOST_KNOWN]) or 'none'}{more}"
