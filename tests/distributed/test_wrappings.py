"""Every wrapping holds the shipped suite on two processes, and the suite finds what it is for."""

from __future__ import annotations

import pytest

from tests.distributed.ranks import held, launch
from tests.distributed.wrapping_worker import CHECKS


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return launch("tests.distributed.wrapping_worker", 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_on_two_ranks(told: list[dict[str, str]], check: str) -> None:
    held(told, check)
