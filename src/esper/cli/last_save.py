"""Save what a run has grown, whatever the disk says: in its folder or elsewhere, and say where."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from esper.errors import StateError
from esper.tolaria.trainer import Trainer


def save_model(trainer: Trainer, folder: Path) -> Path:
    """Save the model in a run's folder; a second try and one among the temporary files come after a failure.

    Returns:
        Where it is; another place than ``folder / "model"`` was told.

    Raises:
        StateError: It could not be saved anywhere; the message says which checkpoint holds it.
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
        raise StateError(
            f"the model could be saved neither in {target} nor elsewhere: {error}{held or '; it is lost'}"
        ) from None
    print(f"esper: the model is in {place} instead; move it before it is cleared away{held}", file=sys.stderr)
    return place
