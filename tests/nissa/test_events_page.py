"""docs/events.md lists every kind of event with the fields it must carry."""

from __future__ import annotations

import re
from pathlib import Path

from esper.contracts import EVENT_FIELDS
from esper.nissa.run.journal import DURABLE

PAGE = (Path(__file__).parents[2] / "docs" / "events.md").read_text(encoding="utf-8")


def test_the_page_lists_every_kind_with_its_fields() -> None:
    rows = [line.split("|")[1:-1] for line in PAGE.splitlines() if line.startswith("| `")]
    told = {kind.strip(" `"): tuple(re.findall(r"`(\w+)`", data)) for kind, _, data in rows}
    assert told == EVENT_FIELDS


def test_the_page_names_what_is_on_the_disk_at_once() -> None:
    (paragraph,) = [part for part in PAGE.split("\n\n") if "(`fsync`)" in part]
    names = re.findall(
        r"`(\w+)`", paragraph[paragraph.index("says so.") : paragraph.index("are on the disk")]
    )
    assert set(names) == DURABLE
