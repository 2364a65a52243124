"""Check what the user gives to ``Trainer`` besides what ``grow`` takes, before anything is touched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from esper.arguments import batches, function, whole, word
from esper.errors import ConfigError
from esper.printable import quoted

MOST_EPOCHS = 10**9
MOST_STEPS = 10**12  # between checkpoints
MOST_KEPT = 10**9
KEPT = 3  # checkpoints, by default
INTERVALS = ("epoch", "step")
SAVED = ("train_loss",)  # what the trainer tells its checkpoints, in the middle of an epoch
OWN = ("epoch", "train_loss")  # columns of the history, which no metric replaces
STORAGE = ("put", "get", "names", "delete", "mend")


def refuse_training(
    *,
    train: object,
    val: object,
    epochs: object,
    scheduler: object,
    scheduler_interval: object,
    metrics: object,
) -> None:
    """Refuse what no training can be made of.

    Raises:
        ConfigError: With what was given.
    """
    batches("train", train)
    if val is not None:
        batches("val", val)
    whole("epochs", epochs, least=1, most=MOST_EPOCHS)
    word("scheduler_interval", scheduler_interval, INTERVALS)
    if scheduler is not None and not callable(getattr(scheduler, "step", None)):
        raise ConfigError(
            f"scheduler={quoted(scheduler)}: a {type(scheduler).__name__} has no step(); give a scheduler of "
            "the optimizer, or leave it out"
        )
    if metrics is not None and not isinstance(metrics, Mapping):
        raise ConfigError(f"metrics={quoted(metrics)}; give functions of model and batch by name")
    for name, metric in (metrics or {}).items():
        if not isinstance(name, str) or name in OWN:
            raise ConfigError(f"a metric is named {quoted(name)}; give text, and not {' or '.join(OWN)}")
        function(f"metrics[{quoted(name)}]", metric, "of model and batch")


def refuse_keeping(
    *, checkpoints: object, every: object, keep: object, best: object, measured: Iterable[str] | None
) -> None:
    """Refuse checkpoints that cannot be kept as asked, and words about them where there are none.

    Args:
        checkpoints: As for ``Trainer``, like the three that follow.
        every: Steps or time between them.
        keep: Number of the newest.
        best: Metric and direction.
        measured: Names of what is measured on ``val`` after each epoch; None where there is no ``val``.

    Raises:
        ConfigError: With what was given.
    """
    if checkpoints is None:
        asked = {
            "every": every is not None,
            "keep": not isinstance(keep, int) or keep != KEPT,
            "best": best is not None,
        }
        if said := [name for name, is_asked in asked.items() if is_asked]:
            raise ConfigError(f"{' and '.join(said)} without checkpoints=; say where to keep them")
        return
    is_path = isinstance(checkpoints, str | Path) and checkpoints != ""
    if not is_path and not all(callable(getattr(checkpoints, name, None)) for name in STORAGE):
        raise ConfigError(f"checkpoints={quoted(checkpoints)}; give a folder, a URL or a storage")
    if "\0" in str(checkpoints):
        raise ConfigError(f"checkpoints={quoted(checkpoints)} is no path: it has a NUL")
    if isinstance(every, timedelta):
        if every <= timedelta():
            raise ConfigError(f"every={every}; give a time that is positive")
    else:
        whole("every", every, least=1, most=MOST_STEPS, none=True)
    whole("keep", keep, least=1, most=MOST_KEPT, none=True)
    if best is not None:
        _refuse_best(best, measured)


def _refuse_best(best: object, measured: Iterable[str] | None) -> None:
    several = isinstance(best, Sequence) and not isinstance(best, str | bytes) and len(best) == 2
    if not several or not isinstance(best[0], str) or best[1] not in ("min", "max"):
        raise ConfigError(f"best={quoted(best)}; give a metric and 'min' or 'max', as in {SAVED[0], 'min'}")
    if measured is None and best[0] not in SAVED:
        raise ConfigError(
            f"best[0]={quoted(best[0])} is measured on val=, and there is none; known without it: {SAVED[0]}"
        )
    word("best[0]", best[0], (*SAVED, *(measured or ())))
