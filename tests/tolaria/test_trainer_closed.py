"""A trainer that is given up in mid-run leaves its run folder and its model to whoever goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import esper
from esper.nissa.run.journal import RunJournal
from tests.cases.loops import Batch, Task, cross_entropy, narrow


def trainer(folder: Path, net: nn.Module, train: list[Batch], growth: str = "auto") -> esper.Trainer:
    return esper.Trainer(
        net,
        torch.optim.Adam(net.parameters(), 0.01),
        cross_entropy,
        train=train,
        probe=[Task(2)(64)],
        epochs=2,
        run_dir=folder / "run",
        checkpoints=folder / "kept",
        growth=growth,  # pyrefly: ignore  # one of them
    )


class Cut(list[Batch]):
    """Batches of which the third is never reached."""

    def __iter__(self) -> Iterator[Batch]:
        yield from self[:2]
        raise KeyboardInterrupt


def interrupted(folder: Path, net: nn.Module, train: list[Batch], growth: str) -> None:
    with trainer(folder, net, Cut(train), growth=growth) as made:
        made.fit()


@pytest.mark.parametrize("growth", ["early", "incubate"])
def test_one_that_was_interrupted_gives_its_folder_and_model_back(tmp_path: Path, growth: str) -> None:
    draw = Task()
    train, net = [draw() for _ in range(4)], narrow()
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path, net, train, growth)
    assert not [name for name, module in net.named_modules() if "_esper_seam" in vars(module)]
    with RunJournal(tmp_path / "run"):  # the folder is free
        pass
    esper.grow(net, torch.optim.Adam(net.parameters()), cross_entropy, probe=[draw(64)], steps=9).finish()
    again = trainer(tmp_path, narrow(), train, growth=growth)
    again.resume()
    again.fit()
    assert len(again.history) == 2


def test_closing_twice_and_after_the_end_is_nothing(tmp_path: Path) -> None:
    draw = Task()
    with trainer(tmp_path, narrow(), [draw() for _ in range(4)]) as made:
        made.fit()
        made.close()


def test_a_closed_trainer_takes_no_step(tmp_path: Path) -> None:
    draw, net = Task(), narrow()
    before = [one.clone() for one in net.parameters()]
    made = trainer(tmp_path, net, [draw() for _ in range(4)])
    made.close()
    with pytest.raises(esper.FinishedError, match="was closed"):
        made.fit()
    assert all(map(torch.equal, before, net.parameters()))
