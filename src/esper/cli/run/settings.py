"""What a training run was asked to do, as plain values: kept in its checkpoints, compared when it goes on."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Mapping, Sized
from pathlib import Path

from esper.cli.run.recipe import Recipe
from esper.cli.run.resolve import Data
from esper.config import Config

ELSEWHERE = ("purelib", "platlib", "stdlib")
COMPARED = ("model", "data", "loss", "optimizer", "scheduler", "metrics", "seed", "growth", "code", "loaded")


def settings_of(path: Path, recipe: Recipe, growth: Config, data: Data) -> dict[str, object]:
    """Describe a run; called once its model and data are made, so that their modules are loaded.

    Args:
        path: Path of the config.
        recipe: The config as it was read.
        growth: Settings of growth, those of the environment among them.
        data: Batches trained and judged on, by name.
    """
    given = recipe.model_dump(mode="json", exclude={"growth", "run_dir", "checkpoints"})
    return {
        **given,
        "growth": growth.model_dump(mode="json"),
        "code": code_beside(path),
        "loaded": {name: sizes(batches) for name, batches in data.items() if batches is not None},
    }


def code_beside(path: Path) -> dict[str, str]:
    """Return digests of the loaded modules that lie below the config's folder, by their path there."""
    folder = path.resolve().parent
    installed = {Path(sysconfig.get_path(kind)).resolve() for kind in ELSEWHERE}
    found = {}
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        place = Path(file).resolve() if isinstance(file, str) else None
        if place is None or not place.is_relative_to(folder) or not place.is_file():
            continue
        if not any(place.is_relative_to(other) for other in installed if other.is_relative_to(folder)):
            name = place.relative_to(folder).as_posix()
            found[name] = hashlib.sha256(place.read_bytes()).hexdigest()[:16]
    return dict(sorted(found.items()))


def sizes(batches: object) -> dict[str, int | None]:
    """Count the batches and, where there is a dataset, its examples and those of a batch."""
    size = getattr(batches, "batch_size", None)
    return {
        "batches": length(batches),
        "examples": length(getattr(batches, "dataset", None)),
        "batch_size": size if isinstance(size, int) else None,
    }


def length(of: object) -> int | None:
    """Return a length, None where there is none."""
    try:
        return len(of) if isinstance(of, Sized) else None
    except TypeError:  # a DataLoader over an iterable dataset has a __len__ that raises
        return None


def differences(saved: object, given: object, where: str = "") -> list[tuple[str, object, object]]:
    """Name every setting that is not as it was, with what it was and is."""
    if isinstance(saved, Mapping) and isinstance(given, Mapping):
        keys = [*saved, *(key for key in given if key not in saved)]
        found: list[tuple[str, object, object]] = []
        for key in keys:
            found += differences(saved.get(key), given.get(key), f"{where}.{key}" if where else str(key))
        return found
    return [] if saved == given or repr(saved) == repr(given) else [(where, saved, given)]
