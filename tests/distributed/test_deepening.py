"""A block that comes on two processes, under DistributedDataParallel and FSDP2."""

from __future__ import annotations

import pytest

from tests.distributed.deepening_worker import CHECKS
from tests.distributed.ranks import held, launch


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return launch("tests.distributed.deepening_worker", 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_on_two_ranks(told: list[dict[str, str]], check: str) -> None:
    held(told, check)
