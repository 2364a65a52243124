"""A12, A15, A17: saved folders in which anything is changed are refused in Esper's words, or say the same."""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.errors import SavedModelError
from esper.kasmina.widths.places import WidenPlace
from esper.saving import rebuild_template
from esper.saving.save import FILES, load_into, save
from esper.surgery.widen_layers import empty_slices, widen
from tests.cases.loops import narrow


def flipped(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]


def cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def longer(content: bytes, draw: random.Random) -> bytes:
    return content + draw.randbytes(draw.randrange(1, 9))


def doubled(content: bytes, draw: random.Random) -> bytes:
    return content + content


@pytest.mark.parametrize("damage", [flipped, cut, longer, doubled])
@pytest.mark.parametrize("name", sorted(FILES))
def test_a_damaged_file_is_refused(
    name: str, damage: Callable[[bytes, random.Random], bytes], tmp_path: Path, count: Callable[..., None]
) -> None:
    folder, draw = save(nn.Linear(2, 2), [], tmp_path / "grown", card={}), random.Random(0)
    content, accepted = (folder / name).read_bytes(), 0
    tries = 12
    for _ in range(tries):
        (folder / name).write_bytes(damage(content, draw))
        net = nn.Linear(2, 2)
        before = net.weight.detach().clone()
        try:
            load_into(net, folder)
            accepted += 1
        except SavedModelError:
            assert torch.equal(net.weight, before)
    count(tries, accepted)
    assert accepted == 0


ODD: list[Any] = [None, True, -1, 10**30, 1.5, "x", "\x1b[31m", [], {}, [[]], {"a": 1}, "../x"]


def otherwise(tree: Any, draw: random.Random) -> Any:
    """Return JSON in which one value, anywhere, is missing, another or of another kind."""
    tree = copy.deepcopy(tree)
    holder, key = tree, draw.choice(list(tree))
    while isinstance(holder[key], (dict, list)) and holder[key] and draw.random() < 0.8:
        holder = holder[key]
        key = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
    if draw.random() < 0.3:
        del holder[key]
    else:
        holder[key] = draw.choice(ODD)
    return tree


@pytest.mark.parametrize("read", [load_into, rebuild_template.load], ids=["load_into", "rebuild"])
def test_a_genome_that_says_something_else_under_its_own_digest(
    read: Callable[[nn.Module, Path], object], tmp_path: Path, count: Callable[..., None]
) -> None:
    net, draw = narrow(), random.Random(0)
    place = esper.wrap(net, torch.zeros(4, 10)).places["0>2"]
    assert isinstance(place, WidenPlace)
    plan = place.plan(2)
    widen(net, plan, empty_slices(net, plan))
    folder = save(net, [plan], tmp_path / "grown", card={})
    whole, tries = json.loads((folder / "genome.json").read_text()), 120
    refused: list[str] = []
    for _ in range(tries):
        (folder / "genome.json").write_text(json.dumps(otherwise(whole, draw)))
        names = [line.split()[1] for line in (folder / "SHA256SUMS").read_text().splitlines()]
        sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
        (folder / "SHA256SUMS").write_text("".join(sums))
        try:
            read(narrow(), folder)
        except ValueError as error:  # SavedModelError is one
            refused.append(str(error))
    count(tries, 0)
    assert len(refused) > tries / 2
    assert all(one.isprintable() or one == "\n" for why in refused for one in why)
    assert max(map(len, refused)) < 3000
