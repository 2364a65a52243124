"""A5: what is resumed with something changed is refused by its name, and the checkpoint goes on being one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from esper.checkpoint import Batches, CheckpointManager, MemoryStorage, Run
from esper.errors import EsperError
from tests.checkpoint.test_checkpoints import Plain
from tests.cli.test_going_on import CHANGES, kept, started, stopped, write

__all__ = ["stopped"]  # a fixture


OTHERS: dict[str, tuple[Callable[[Plain], dict[str, Any]], str]] = {
    "an optimizer less": (lambda run: {"optimizers": {"net": run.optimizers["net"]}}, "optimizers 'head'"),
    "an optimizer by another name": (
        lambda run: {"optimizers": {"net": run.optimizers["net"], "tail": run.optimizers["head"]}},
        "optimizers 'head'",
    ),
    "another optimizer": (
        lambda run: {
            "optimizers": {**run.optimizers, "head": torch.optim.Adam(run.head.parameters())},
        },
        "is SGD, the run's Adam",
    ),
    "a scheduler less": (lambda run: {"others": {}}, "others 'scheduler'"),
    "a generator less": (lambda run: {"generators": {}}, "give the run those it had"),
    "batches more": (lambda run: {"batches": Batches([1, 2])}, "no batches"),
    "a module of another shape": (
        lambda run: {"modules": {"head": nn.Linear(3, 1)}, "optimizers": run.optimizers},
        "does not fit head",
    ),
    "a module less": (lambda run: {"modules": {}}, "head"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_run_is_refused_by_name(what: str) -> None:
    storage = MemoryStorage()
    first = Plain(storage)
    first.train(2)
    first.manager.save(wait=True)
    other = Plain(MemoryStorage())
    run = other.manager.run
    facts = {name: getattr(run, name) for name in ("optimizers", "modules", "others", "generators")}
    changes, said = OTHERS[what]
    with pytest.raises(EsperError, match=said):
        CheckpointManager(storage, Run(run.model, **{**facts, **changes(other)})).resume()
    again = Plain(storage)
    again.manager.resume()  # the run that fits goes on as if nobody had tried
    assert all(torch.equal(tensor, first.weights()[name]) for name, tensor in again.weights().items())


@pytest.mark.slow
@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.usefixtures("stopped")
def test_a_changed_config_is_refused_by_name(what: str, tmp_path: Path) -> None:
    changes, complaint = CHANGES[what]
    before, names = (tmp_path / "run" / "events.jsonl").read_bytes(), kept(tmp_path)
    write(tmp_path, **changes)
    process = started(tmp_path, "--resume", "auto")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert complaint in said
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == before
    assert kept(tmp_path) == names
