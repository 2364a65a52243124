"""A block that comes on two processes, under DistributedDataParallel and FSDP2."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.deepening_worker import CHECKS
from tests.distributed.ranks import launch


@pytest.mark.slow
def test_a_block_comes_to_two_ranks(tmp_path: Path) -> None:
    told = launch("tests.distributed.deepening_worker", 2, tmp_path)
    for rank, found in enumerate(told):
        for check in CHECKS:
            assert found.get(check, "not reached") == "", f"rank {rank}"
