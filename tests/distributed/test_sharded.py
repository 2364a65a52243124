"""Checkpoints of sharded runs: two processes save, one, three and none load; what one refuses, all refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from esper.checkpoint.contents.sharded import load_sharded
from esper.storage.folder import FolderStorage
from tests.distributed.ranks import held, launch
from tests.distributed.sharded_worker import LOADING, NAME, SAVING, by_name, run_of, widened

WORKER = "tests.distributed.sharded_worker"
Told = dict[int, list[dict[str, str]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def told(folder: Path) -> Told:
    found = {}
    for world in (2, 1, 3):
        (folder / str(world)).mkdir()
        found[world] = launch(WORKER, world, folder / str(world))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "check"), [(2, check) for check in SAVING] + [(w, check) for w in (1, 3) for check in LOADING]
)
def test_on_ranks(told: Told, world: int, check: str) -> None:
    held(told[world], check)


@pytest.mark.slow
def test_without_processes_a_plain_model_loads_them(told: Told, folder: Path) -> None:
    net = widened()
    optimizers = run_of(net)
    load_sharded(FolderStorage(folder / "run"), NAME, net, optimizers)
    found, reference = by_name(net, optimizers), load_file(folder / "reference.safetensors")
    assert found.keys() == reference.keys()
    assert all(torch.equal(value, reference[name]) for name, value in found.items())
