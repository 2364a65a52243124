"""ARCHITECTURE.md's walk of one batch names the files that a step enters, in the order in which it does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
TITLE = "## One batch, file by file"
MOST = 20  # files of a step at which nothing is due


@cache
def walks() -> dict[str, list[str]]:
    command = [sys.executable, str(ROOT / "tests" / "walk.py")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def listed() -> list[str]:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = text.split(TITLE, 1)[1].split("\n## ", 1)[0]
    numbered = re.findall(r"^(\d+)\. `([^`]+)`", section, re.MULTILINE)
    assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
    return [name for _, name in numbered]


def test_a_step_at_which_nothing_is_due_can_be_read_in_twenty_files() -> None:
    walk = walks()["nothing due"]
    assert len(walk) <= MOST
    assert listed() == walk
