"""``truncated_checkpoint``: a file of the newest checkpoint ends early."""

from __future__ import annotations

import os
import random
from pathlib import Path

from esper.chaos.fault import Seen, Verdict
from esper.chaos.faults.flipped_checkpoint import newest_part, stepped_back
from esper.chaos.faults.kill import Kill

__all__ = ["TruncatedCheckpoint"]


class TruncatedCheckpoint(Kill):
    """Kills the process, and cuts a file of what it kept last."""

    about = "the newest checkpoint of a killed run ends early"

    def damage(self, checkpoints: Path, draw: random.Random) -> str | None:
        """Cut one file at a random length."""
        path = newest_part(checkpoints, draw)
        if path is None:
            return None
        whole = path.stat().st_size
        length = draw.randrange(whole)
        os.truncate(path, length)
        return f"{path.parent.name}/{path.name} cut to {length} of {whole} bytes"

    def judge(self, seen: Seen) -> Verdict:
        """Judge by whether the damage was found."""
        return stepped_back(seen)
