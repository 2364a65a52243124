"""A12, A15, A17: saved folders in which anything is changed are refused in Esper's words, or say the same."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from esper.errors import SavedModelError
from esper.saving.save import FILES, load_into, save


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
