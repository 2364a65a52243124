"""``flipped_checkpoint``: one bit of the newest checkpoint is another one."""

from __future__ import annotations

import random
from pathlib import Path

from esper.chaos.fault import Seen, Verdict
from esper.chaos.faults.kill import Kill, resumed

__all__ = ["FlippedCheckpoint"]


class FlippedCheckpoint(Kill):
    """Kills the process, and flips a bit in what it kept last."""

    about = "a bit flips in the newest checkpoint of a killed run"

    def damage(self, checkpoints: Path, draw: random.Random) -> str | None:
        """Flip one bit of one file."""
        path = newest_part(checkpoints, draw)
        if path is None:
            return None
        content = bytearray(path.read_bytes())
        at = draw.randrange(8 * len(content))
        content[at // 8] ^= 1 << at % 8
        path.write_bytes(content)
        return f"bit {at} of {path.parent.name}/{path.name} flipped"

    def judge(self, seen: Seen) -> Verdict:
        """Judge by whether the damage was found: another checkpoint must have been taken."""
        return stepped_back(seen)


def newest_part(checkpoints: Path, draw: random.Random) -> Path | None:
    """Choose a file of the newest checkpoint, large ones as often as small ones; None where there is none."""
    kept = sorted(path for path in checkpoints.glob("step-*") if path.is_dir())
    return draw.choice(sorted(p for p in kept[-1].iterdir() if p.stat().st_size)) if kept else None


def stepped_back(seen: Seen) -> Verdict:
    """Say which checkpoint was passed over, and where the run went on."""
    damages = [mark["what"] for mark in seen.of("damage")]
    told = seen.messages("passed over")
    if not damages:
        return Verdict(True, f"there was no checkpoint to damage yet; {resumed(seen).what}")
    noticed = "passed over" if told else "not noticed"
    return Verdict(bool(told), f"{damages[0]}; {noticed}; {resumed(seen).what}")
