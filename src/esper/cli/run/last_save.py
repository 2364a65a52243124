"""Save what a run has grown, whatever the disk says: in its folder or elsewhere, and say where."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from esper.errors import StateError
from esper.tolaria.trainer import Trainer


def save_model(trainer: Trainer, folder: Path) -> Path | None:
    """Save the model in a run's folder; a second try and one among the temporary files come after a failure.

    Returns:
        Where it is; another place than ``folder / "model"`` was told. None: nowhere, but in the checkpoint
        that was told, if one is kept.
    """
    target, last = folder / "model", trainer.manager.last if trainer.manager is not None else None
    for _ in range(2):
        try:
            return trainer.growth.save(target)
        except StateError as error:
            failure = error
    print(f"esper: {failure}", file=sys.stderr)
    held = f"; checkpoint {last} holds it: esper checkpoints export {folder} TO" if last is not None else ""
    try:
        place = trainer.growth.save(Path(tempfile.mkdtemp(prefix="esper-model-")))
    except (StateError, OSError) as error:
        print(f"esper: nor could it be saved elsewhere: {error}{held or '; it is lost'}", file=sys.stderr)
        return None
    print(f"esper: the model is in {place} instead; move it before it is cleared away{held}", file=sys.stderr)
    return place
