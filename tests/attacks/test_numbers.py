"""Numbers that no run has are refused at the start; looking a name up draws no random number."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import esper
from esper.errors import ConfigError
from tests.cases.loops import Task, cross_entropy, narrow


@pytest.mark.parametrize(
    "given",
    [{"steps": n} for n in (0, -1, True, 10**30, "10", float("nan"))] + [{"seed": "x"}, {"seed": -1}],
)
def test_a_number_that_is_none_is_refused(given: dict[str, Any]) -> None:
    net = narrow()
    optimizer = torch.optim.Adam(net.parameters())
    with pytest.raises(ConfigError, match=next(iter(given))):
        esper.grow(net, optimizer, cross_entropy, probe=[Task()(99)], **given)


def test_the_first_use_of_a_name_draws_no_random_number() -> None:
    program = "import random, esper; s = random.getstate(); esper.grow; assert s == random.getstate()"
    subprocess.run([sys.executable, "-c", program], check=True)
