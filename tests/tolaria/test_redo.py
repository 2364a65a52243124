"""A decision that was journalled is taken again as it was, whatever the next process would have decided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.checkpoint import CheckpointManager
from esper.checkpoint import Run as Parts
from esper.contracts import Event
from esper.nissa.run.history import fold
from esper.nissa.run.journal import EVENTS_FILE, read_events
from tests.tolaria.test_conductor import clusters, loss_fn

STEPS, CLASSES, SAVED = 160, 8, 10


class Process:
    """One process of a run; killed, it says no word, and its folders are free."""

    def __init__(self, folder: Path, **options: Any) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(CLASSES, 1), nn.Tanh(), nn.Linear(1, CLASSES))
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.02)
        self.events: list[Event] = []
        budget = {"growth_factor": 8.0, **options.pop("budget", {})}
        self.growth = esper.grow(
            self.net,
            self.optimizer,
            loss_fn,
            probe=[clusters(10_000, 256)],
            steps=STEPS,
            budget=budget,
            growth="incubate",
            run_dir=folder,
            on_event=self.events.append,
            **options,
        )
        run = Parts(self.net, self.optimizer, growth=self.growth)
        self.manager = CheckpointManager(folder / "checkpoints", run, every=10_000)
        found = self.manager.resume()
        self.begun = 0 if found is None else found.step

    def train(self, until: int) -> None:
        for step in range(self.begun, until):
            batch = clusters(step)
            loss = loss_fn(self.net, batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.growth.step(batch, loss)
            if step + 1 == SAVED:
                self.manager.save(wait=True)
        self.begun = until

    def kill(self) -> None:
        for lease in (self.manager.lease, self.growth.loop.redo.journal._lease):
            lease.release()

    def told(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    def applied(self) -> list[tuple[int, str | None, int]]:
        return [(event.step, event.data["site"], event.data["width"]) for event in self.told("decision")]


@pytest.fixture
def killed(tmp_path: Path) -> tuple[Path, Process]:
    """A run that was killed right behind a decision, which stands in its journal; it was saved at step 10."""
    first = Process(tmp_path)
    while not first.told("decision"):
        first.train(first.begun + 1)
    assert first.begun > SAVED
    first.kill()
    return tmp_path, first


OTHERWISE: dict[str, dict[str, Any]] = {
    "the time went to the process that was killed": {"budget": {"wall_seconds": 1e-6}},
    "no event is left": {"budget": {"growth_events": 0}},
    "other widths": {"config": {"widths": {"shares": [4.0]}}},
    "nothing is due yet": {"config": {"schedule": {"warmup": 0.5}}},
}


@pytest.mark.parametrize("options", OTHERWISE.values(), ids=list(OTHERWISE))
def test_the_journal_has_the_last_word(killed: tuple[Path, Process], options: dict[str, Any]) -> None:
    folder, first = killed
    again = Process(folder, **options)
    assert again.begun == SAVED
    again.train(first.begun)
    assert again.applied() == first.applied()
    again.train(STEPS)
    again.growth.finish()  # the outcome of a decision that Tamiyo would not have taken is learned
    history = fold(read_events(folder))
    assert [item.id for item in history.decisions.values()] == list(range(1, len(history.decisions) + 1))
    assert history.decisions[1].outcome is not None
    assert history.resumes[0].name == "step-00000010"
    assert not history.fallbacks


def test_a_choice_that_differs_is_told(killed: tuple[Path, Process]) -> None:
    folder, first = killed
    again = Process(folder, budget={"wall_seconds": 1e-6})
    again.train(first.begun)
    (said,) = [event for event in again.told("warning") if "journalled" in event.data["message"]]
    site, width = first.told("decision")[0].data["site"], first.told("decision")[0].data["width"]
    assert f"is taken as journalled, widen {site} by {width}" in said.data["message"]
    assert said.data["message"].endswith("this process would have chosen to do nothing")


def test_where_nothing_differs_nothing_is_told_and_every_bit_is_the_same(
    killed: tuple[Path, Process], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, _ = killed
    again, whole = Process(folder), Process(tmp_path_factory.mktemp("whole"))
    for run in (again, whole):
        run.train(STEPS)
        run.growth.finish()
    assert again.growth.plans
    assert again.growth.plans == whole.growth.plans
    for name, tensor in whole.net.state_dict().items():
        assert torch.equal(again.net.state_dict()[name], tensor), name
    assert not [event for event in again.told("warning") if "journalled" in event.data["message"]]


@pytest.mark.parametrize("options", OTHERWISE.values(), ids=list(OTHERWISE))
def test_without_the_journal_each_of_them_decides_otherwise(
    killed: tuple[Path, Process], options: dict[str, Any]
) -> None:
    folder, first = killed
    (folder / EVENTS_FILE).unlink()
    again = Process(folder, **options)
    again.train(first.begun)
    assert again.applied() != first.applied()


def test_a_damaged_journal_is_told_and_does_not_stop_the_run(killed: tuple[Path, Process]) -> None:
    folder, first = killed
    lines = (folder / EVENTS_FILE).read_bytes().splitlines(keepends=True)
    (folder / EVENTS_FILE).write_bytes(b"".join([lines[0], b"nonsense\n", *lines[2:]]))
    again = Process(folder)
    again.train(first.begun)
    assert again.applied() == first.applied()
    assert "decided behind the checkpoint is lost" in again.told("warning")[0].data["message"]


def test_a_site_that_is_not_free_is_told(killed: tuple[Path, Process]) -> None:
    folder, first = killed
    content = (folder / EVENTS_FILE).read_text()
    (folder / EVENTS_FILE).write_text(
        content.replace('"action":"widen","site":"0>2"', '"action":"widen","site":"gone"')
    )
    again = Process(folder)
    again.train(first.begun)
    assert again.applied() == first.applied()  # its own, which is the same
    assert [event for event in again.told("warning") if "gone is not free" in event.data["message"]]
