"""Checks of test_growing_early.py for both ranks: the early recipe waits, and does the same in all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

import esper
from esper.checkpoint import CheckpointManager, Run
from esper.contracts import Event
from tests.distributed.ranks import take_part

STEPS, BATCH, CLASSES, EVERY = 120, 64, 8, 10


def clusters(seed: int, examples: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(CLASSES, (examples,), generator=generator)
    return 2 * torch.eye(CLASSES)[label] + 0.3 * torch.randn(examples, CLASSES, generator=generator), label


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def plain() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Linear(8, 2), nn.Tanh(), nn.Linear(2, 4), nn.ReLU()), nn.Linear(4, CLASSES)
    )


class Heads(nn.Module):
    """Two layers read one, one of them through a step of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(2, CLASSES), nn.Linear(2, CLASSES)

    def forward(self, h: Tensor) -> Tensor:
        return self.one(torch.relu(h)) + self.two(h)


def forked() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 2), Heads())


class Together:
    """One run on all ranks, each with a part of every batch and the same probe."""

    def __init__(
        self, rank: int, world: int, wrap: str, make: Callable[[], nn.Sequential] = plain, **options: Any
    ) -> None:
        torch.manual_seed(0)
        self.rank, self.world = rank, world
        self.net = make()
        self.model: nn.Module = self.net
        if wrap == "ddp":
            self.model = DistributedDataParallel(self.net)
        elif wrap == "fsdp":
            fully_shard(self.net[0])
            fully_shard(self.net)
        self.optimizer = Adam(self.model.parameters(), lr=0.02)
        self.scheduler = CosineAnnealingLR(self.optimizer, STEPS)
        self.events: list[Event] = []
        self.growth = esper.grow(
            self.model,
            self.optimizer,
            loss_fn,
            steps=STEPS,
            schedulers=[self.scheduler],
            growth="early",
            on_event=self.events.append,
            **{"probe": [clusters(10_000, 512)], **options},
        )

    def step(self, rewrap: bool = True) -> None:
        inputs, labels = clusters(self.growth.steps)
        batch = inputs[self.rank :: self.world], labels[self.rank :: self.world]
        loss = loss_fn(self.model, batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.growth.step(batch, loss)
        if rewrap and self.growth.steps % EVERY == 0:
            assert self.growth.rewrap() is self.model

    def to(self, step: int, rewrap: bool = True) -> Together:
        while self.growth.steps < step:
            self.step(rewrap)
        return self

    def told(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    def weights(self) -> Tensor:
        with self.growth.run.parts.wrapping.plain(self.growth.run.parts.optimizers):
            return torch.cat([p.detach().flatten().clone() for p in self.net.parameters()])

    def kept(self, place: Path) -> CheckpointManager:
        run = Run(self.model, self.optimizer, growth=self.growth, others={"scheduler": self.scheduler})
        return CheckpointManager(place, run, every=10**6)

    def same_everywhere(self) -> Tensor:
        own = self.weights()
        sizes = self.growth.peers.all_gather_ints([len(own), self.growth.run.topology])
        assert all(size == sizes[0] for size in sizes), sizes
        found = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(found, own)
        assert all(torch.equal(own, other) for other in found)
        return own


def an_event_waits_until_shapes_may_change(rank: int, world: int, folder: Path) -> None:
    for wrap in ("ddp", "fsdp"):
        run = Together(rank, world, wrap)
        size = len(run.weights())
        run.to(STEPS // 2, rewrap=False)
        assert len(run.weights()) == size, wrap
        assert not run.told("widened")
        assert sum("growth.rewrap()" in event.data["message"] for event in run.told("warning")) == 1
        assert run.growth.growing
        run.growth.rewrap()
        assert len(run.weights()) > size, wrap
        assert {event.step for event in run.told("widened")} == {STEPS // 2}
        run.to(STEPS // 2 + 5)
        run.same_everywhere()


def both_grow_the_same(rank: int, world: int, folder: Path, make: Any = plain) -> None:
    for wrap in ("ddp", "fsdp"):
        run = Together(rank, world, wrap, make)
        size = len(run.weights())
        run.to(STEPS)
        assert run.growth.finish() is run.model
        own = run.same_everywhere()
        assert len(own) > 1.5 * size, wrap
        assert all(event.step % EVERY == 0 for event in run.told("widened"))
        assert bool(torch.isfinite(own).all())
        sharded = [isinstance(p, DTensor) for p in run.net.parameters()]
        assert all(sharded) == any(sharded) == (wrap == "fsdp")
        assert str(run.growth)


def a_trunk_of_two_heads_grows_the_same(rank: int, world: int, folder: Path) -> None:
    both_grow_the_same(rank, world, folder, forked)


def shards_grow_as_replicas_do(rank: int, world: int, folder: Path) -> None:
    replicated, sharded = (Together(rank, world, wrap).to(STEPS) for wrap in ("ddp", "fsdp"))
    assert [event.data["site"] for event in replicated.told("widened")] == [
        event.data["site"] for event in sharded.told("widened")
    ]
    assert torch.allclose(replicated.same_everywhere(), sharded.same_everywhere(), atol=1e-4)


def the_evidence_is_the_same_in_all(rank: int, world: int, folder: Path) -> None:
    """Each process sees a part of the training examples; what they say is added up before a choice."""
    run = Together(rank, world, "ddp").to(STEPS)
    found = [(event.step, event.data["site"], event.data["p_value"]) for event in run.told("gate")]
    assert found
    every = run.growth.peers.gather_bytes(repr(found).encode())
    assert rank or every[0] == every[1]


def what_is_taken_back_is_taken_back_in_all(rank: int, world: int, folder: Path) -> None:
    for wrap in ("ddp", "fsdp"):
        run = Together(rank, world, wrap)
        size = len(run.weights())
        while not run.told("widened"):
            run.step()
        early = run.growth.loop.early
        assert early is not None
        assert early.open is not None
        early.open.held_out, early.open.extended, early.open.until = -1.0, True, run.growth.steps + 1
        grown = len(run.weights())
        run.step(rewrap=False)
        assert len(run.weights()) == grown, "it waits, too"
        run.growth.rewrap()
        assert run.told("taken_back")
        if early.open is None:
            assert len(run.weights()) == size
        run.to(min(run.growth.steps + 15, STEPS))
        run.growth.finish()
        run.same_everywhere()


def the_stream_is_evidence_in_all(rank: int, world: int, folder: Path) -> None:
    for wrap in ("ddp", "fsdp"):
        run = Together(rank, world, wrap, probe="stream", example=clusters(99)).to(STEPS)
        assert run.told("widened"), wrap
        run.growth.finish()
        run.same_everywhere()


def a_run_goes_on_bit_for_bit(rank: int, world: int, folder: Path) -> None:
    """Also while an event waits for growth.rewrap(), and while one is open."""
    for wrap in ("ddp", "fsdp"):
        whole = Together(rank, world, wrap).to(STEPS)
        whole.growth.finish()
        for at in (0, 7, 17, 33):
            place = folder / f"early-{wrap}-{at}"
            cut = Together(rank, world, wrap)
            manager = cut.kept(place)
            cut.to(at)
            manager.save(wait=True)
            manager.close()
            cut.growth.run.parts.wrapping.close()
            dist.barrier()
            again = Together(rank, world, wrap)
            assert again.kept(place).resume() is not None
            again.to(STEPS)
            again.growth.finish()
            assert torch.equal(whole.same_everywhere(), again.same_everywhere()), (wrap, at)


CHECKS = {
    check.__name__: check
    for check in (
        an_event_waits_until_shapes_may_change,
        both_grow_the_same,
        a_trunk_of_two_heads_grows_the_same,
        shards_grow_as_replicas_do,
        the_evidence_is_the_same_in_all,
        what_is_taken_back_is_taken_back_in_all,
        the_stream_is_evidence_in_all,
        a_run_goes_on_bit_for_bit,
    )
}

if __name__ == "__main__":
    take_part(CHECKS)
