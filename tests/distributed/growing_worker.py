"""Checks of test_growing_together.py that run on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam

import esper
from esper.checkpoint import CheckpointManager, FolderStorage, Run
from esper.checkpoint.exporting import export_model
from esper.checkpoint.format.manifest import damage
from esper.checkpoint.format.reader import newest
from esper.contracts import Event
from esper.distributed.group import Group
from esper.errors import ConfigError, ProcessError, SiteError
from tests.distributed.ranks import take_part

STEPS, BATCH = 120, 32
SHORT: dict[str, Any] = {
    "growth": "incubate",
    "race": {"steps": 8},
    "blend": {"ramp": 4, "stabilise": 2, "evaluate": 2},
    "schedule": {"embargo": 0.02},
}


def task() -> tuple[Tensor, Tensor]:
    """Make a teacher's answers."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(512, 8, generator=generator)
    first, second = torch.randn(8, 16, generator=generator), torch.randn(16, 4, generator=generator)
    return x, (x @ first).relu() @ second


X, Y = task()
PROBE = [(X[384:], Y[384:])]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


class Together:
    """One run on all ranks."""

    def __init__(self, rank: int, world: int, wrap: str = "ddp", **given: Any) -> None:
        torch.manual_seed(0)
        self.rank, self.world = rank, world
        self.net = nn.Sequential(nn.Sequential(nn.Linear(8, 2), nn.ReLU()), nn.Linear(2, 4))
        self.model: nn.Module = self.net
        options = given.pop("options", {})
        if wrap == "ddp":
            self.model = DistributedDataParallel(self.net, **options)
        elif wrap == "fsdp":
            fully_shard(self.net[0])
            fully_shard(self.net)
        self.optimizer = Adam(self.model.parameters(), lr=0.02)
        self.events: list[Event] = []
        config = {**SHORT, **given.pop("config", {})}
        facts: dict[str, Any] = {"probe": PROBE, "steps": STEPS, "config": config, **given}
        self.growth = esper.grow(self.model, self.optimizer, loss_fn, on_event=self.events.append, **facts)
        self.order = torch.Generator().manual_seed(1)

    def step(self) -> None:
        rows = torch.randint(0, 384, (BATCH,), generator=self.order)[self.rank :: self.world]
        batch = X[rows], Y[rows]
        loss = loss_fn(self.model, batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.growth.step(batch, loss)
        if self.growth.steps % 10 == 0:
            self.growth.rewrap()

    def run(self, steps: int = STEPS) -> Together:
        for _ in range(steps):
            self.step()
        return self

    def until(self, stage: str) -> None:
        for _ in range(STEPS):
            self.step()
            if any(e.kind == "stage" and e.data["target"] == stage for e in self.events):
                return
        raise AssertionError(f"no seed came to {stage}")

    def outcomes(self) -> list[tuple[int, bool]]:
        return [(e.data["decision"], e.data["kept"]) for e in self.events if e.kind == "outcome"]

    def kinds(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    def weights(self) -> Tensor:
        with self.growth.run.parts.wrapping.plain(self.growth.run.parts.optimizers):
            return torch.cat([p.detach().flatten().clone() for p in self.net.parameters()])

    def kept(self, place: Path) -> CheckpointManager:
        run = Run(self.model, self.optimizer, growth=self.growth)
        return CheckpointManager(place, run, every=10**6)

    def same_everywhere(self) -> Tensor:
        own = self.weights()
        found = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(found, own)
        assert all(torch.equal(own, other) for other in found)
        lineages = self.growth.peers.all_gather_ints(
            [self.growth.run.orchestrator.lineage, self.growth.run.topology]
        )
        assert lineages[0] == lineages[1]
        return own


def the_group_answers(rank: int, world: int, folder: Path) -> None:
    group = Group(deadline=20.0)
    ones, twos = torch.full((2, 3), float(rank)), torch.full((4,), 2.0 * rank, dtype=torch.float64)
    group.all_reduce_mean([ones, twos])
    assert torch.equal(ones, torch.full((2, 3), 0.5))
    assert torch.equal(twos, torch.ones(4).double())
    number = torch.tensor(rank + 7.0)
    group.broadcast_tensors([number])
    assert number.item() == 7.0
    rows = group.all_gather_rows(torch.full((rank + 1, 2), float(rank)))
    assert rows.tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
    assert group.broadcast_floats([rank + 0.25, float("inf")]) == [0.25, float("inf")]
    assert not group.all_ranks(rank == 0)
    assert group.all_ranks(True)
    assert group.all_gather_ints([rank, 2**62]) == [[0, 2**62], [1, 2**62]]
    assert group.gather_bytes(bytes([rank] * (rank + 1))) == ([b"\0", b"\1\1"] if rank == 0 else [])
    assert group.broadcast_bytes(f"from {rank}".encode()) == b"from 0"
    assert group.broadcast_bytes(b"") == b""


def replicas_grow_as_one_process_does(rank: int, world: int, folder: Path) -> None:
    together = Together(rank, world).run()
    alone = Together(0, 1, "none", config={"distributed": {"mode": "alone"}}).run()
    assert together.outcomes()
    assert together.outcomes()[0] == alone.outcomes()[0] == (1, True)
    gains = [run.kinds("gate")[0].data["gain"] for run in (together, alone)]
    assert abs(gains[0] - gains[1]) <= 0.05 * abs(gains[1]), gains
    assert together.kinds("rewrapped")
    assert not alone.kinds("rewrapped")
    assert together.growth.finish() is together.model
    together.same_everywhere()


def every_option_of_the_wrapper_survives(rank: int, world: int, folder: Path) -> None:
    calls: list[str] = []

    def averaged(state: list[str], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        state.append("reduced")
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0] / world)

    averaged.__annotations__.clear()  # torch compares them with classes, and here they are strings
    for options in (
        {"static_graph": True},
        {"find_unused_parameters": True},
        {"gradient_as_bucket_view": True},
        {"bucket_cap_mb": 1},
        {"forward_sync_buffers": False},
    ):
        run = Together(rank, world, options=options)
        assert isinstance(run.model, DistributedDataParallel)
        run.model.register_forward_hook(lambda *rest: calls.append("forward"))
        if options == {"bucket_cap_mb": 1}:
            run.model.register_comm_hook(calls, averaged)
        wrapper = run.model
        run.run(60)
        assert run.outcomes()[0] == (1, True), options
        assert run.model is wrapper
        for name, value in options.items():
            assert name == "bucket_cap_mb" or getattr(wrapper, name) == value
        before = len(calls)
        run.step()
        assert "forward" in calls[before:]
        assert options != {"bucket_cap_mb": 1} or "reduced" in calls[before:]
        run.same_everywhere()


def shards_grow_as_replicas_do(rank: int, world: int, folder: Path) -> None:
    replicated, sharded = Together(rank, world).run(), Together(rank, world, "fsdp").run()
    assert replicated.outcomes() == sharded.outcomes()
    replicated.growth.finish()
    sharded.growth.finish()
    assert torch.allclose(replicated.same_everywhere(), sharded.same_everywhere(), atol=1e-6)


def a_branch_joins_the_model(rank: int, world: int, folder: Path) -> None:
    for wrap in ("ddp", "fsdp"):
        run = Together(rank, world, wrap, config={"blueprints": ("residual_mlp",)}).run()
        run.growth.finish()
        assert run.kinds("grafted"), wrap
        run.same_everywhere()


def runs_go_on_bit_for_bit(rank: int, world: int, folder: Path) -> None:
    for wrap in ("ddp", "fsdp"):
        whole = Together(rank, world, wrap).run()
        whole.growth.finish()
        for at in (25, 45, 70):  # a race, a branch that waits, a wider model
            place = folder / f"{wrap}-{at}"
            cut = Together(rank, world, wrap)
            manager = cut.kept(place)
            cut.run(at)
            manager.save(wait=True)
            manager.close()
            cut.growth.run.parts.wrapping.close()
            dist.barrier()
            again = Together(rank, world, wrap)
            kept = again.kept(place)
            manifest = kept.resume()
            assert manifest is not None
            assert manifest.step == at
            again.order = cut.order
            again.run(STEPS - at)
            again.growth.finish()
            assert torch.equal(whole.same_everywhere(), again.same_everywhere()), (wrap, at)
            assert whole.growth.run.orchestrator.lineage == again.growth.run.orchestrator.lineage


def a_sharded_checkpoint_fits_a_replicated_run(rank: int, world: int, folder: Path) -> None:
    cut = Together(rank, world, "fsdp")
    manager = cut.kept(folder / "from-shards")
    cut.run(60)
    manager.save(wait=True)
    manager.close()
    dist.barrier()
    for wrap in ("ddp", "fsdp"):
        other = Together(rank, world, wrap)
        with other.kept(folder / "from-shards") as kept:
            assert kept.resume() is not None
        assert torch.equal(other.same_everywhere(), cut.same_everywhere()), wrap
        other.run(10)
        other.same_everywhere()
    dist.barrier()
    if rank == 1:
        return
    storage = FolderStorage(folder / "from-shards")
    found = newest(storage, print)
    assert found is not None
    fresh = nn.Sequential(nn.Sequential(nn.Linear(8, 2), nn.ReLU()), nn.Linear(2, 4))
    model = esper.load_into(fresh, export_model(found, folder / "exported", storage))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert len(weights) == sum(p.numel() for p in cut.net.parameters())
    assert list(damage(storage, found.manifest.name)) == []
    shard = folder / "from-shards" / found.manifest.summary["shards"][1]["name"] / "tensors.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert [part for part, _ in damage(storage, found.manifest.name)] == [shard.parent.name]


def a_fault_in_one_process_counts_in_all(rank: int, world: int, folder: Path) -> None:
    run = Together(rank, world)
    run.until("GRAFTING")
    (trial,) = run.growth.run.orchestrator.exposed
    if rank == 1:
        trial.kernel.register_forward_pre_hook(lambda *rest: 1 / 0)
    run.run(6)
    assert len(run.kinds("fault")) == 3
    assert run.outcomes() == [(1, False)]
    run.same_everywhere()


def a_nan_in_one_process_is_rolled_back_in_all(rank: int, world: int, folder: Path) -> None:
    for steps in (30, 47):  # a host alone; a seed on its way
        run = Together(rank, world, config={"governor": {"enabled": True, "every": 5}})
        run.run(steps)
        rows = torch.randint(0, 384, (BATCH,), generator=run.order)[rank::world]
        loss = loss_fn(run.model, (X[rows] * (float("nan") if rank == 1 else 1.0), Y[rows]))
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        run.growth.step((X[rows], Y[rows]), loss)
        assert len(run.kinds("rolled_back")) == 1
        run.same_everywhere()
        run.run(20)
        run.growth.finish()
        assert bool(torch.isfinite(run.same_everywhere()).all())


def ways_that_part_are_joined(rank: int, world: int, folder: Path) -> None:
    run = Together(rank, world)
    run.until("TRAINING")
    if rank == 1:
        own = run.growth.run.orchestrator
        run.growth.run.tamiyo.learn(own.cull(own.oldest, "on its own"), run.growth.steps)
    run.run(60)
    (told,) = run.kinds("ranks")
    assert "different ways" in told.data["why"]
    run.same_everywhere()
    assert run.outcomes()[-1][1], "growth goes on"


def a_commit_that_fails_in_one_process_fails_in_all(rank: int, world: int, folder: Path) -> None:
    run = Together(rank, world)
    if rank == 1:
        run.growth.run.parts.committer.averages = [nn.Linear(1, 1)]
    run.run(80)
    assert not any(kept for _, kept in run.outcomes())
    reason = run.kinds("outcome")[0].data["reason"]
    assert "put back" in reason
    assert ("another process" in reason) == (rank == 0)
    assert run.net[1].in_features == 2
    run.same_everywhere()


def the_first_process_is_asked(rank: int, world: int, folder: Path) -> None:
    run = Together(rank, world, config={"schedule": {"warmup": 0.9, "stop": 0.95}})
    if rank == 1:
        run.growth.grow_now("0.0>1")
    run.run(4)
    assert not run.kinds("decision")
    if rank == 0:
        run.growth.grow_now("0.0>1")
    run.run(4)
    assert len(run.kinds("decision")) == 1
    if rank == 0:
        run.growth.pause()
    run.step()
    assert run.growth.run.paused


def processes_that_differ_are_refused(rank: int, world: int, folder: Path) -> None:
    for what, given in (("seed", {"seed": rank}), ("steps", {"steps": 10 + rank})):
        with pytest.raises(ProcessError, match=f"differ in {what}"):
            Together(rank, world, **given)
    run = Together(rank, world)
    if rank == 1:
        run.growth.run.topology += 1
    with pytest.raises(ProcessError, match="differ in topology"):
        run.step()


def what_cannot_be_told_of_growth_is_refused(rank: int, world: int, folder: Path) -> None:
    refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (SiteError, "2 processes run", {"wrap": "none"}),
        (ConfigError, "governor", {"wrap": "fsdp", "config": {"governor": {"enabled": True}}}),
    ]
    for kind, words, given in refused:
        with pytest.raises(kind, match=words):
            Together(rank, world, **given)


CHECKS = {
    check.__name__: check
    for check in (
        the_group_answers,
        replicas_grow_as_one_process_does,
        every_option_of_the_wrapper_survives,
        shards_grow_as_replicas_do,
        a_branch_joins_the_model,
        runs_go_on_bit_for_bit,
        a_sharded_checkpoint_fits_a_replicated_run,
        a_fault_in_one_process_counts_in_all,
        a_nan_in_one_process_is_rolled_back_in_all,
        ways_that_part_are_joined,
        a_commit_that_fails_in_one_process_fails_in_all,
        the_first_process_is_asked,
        processes_that_differ_are_refused,
        what_cannot_be_told_of_growth_is_refused,
    )
}

if __name__ == "__main__":
    take_part(CHECKS)
