"""Checks of test_sharded.py that run on every rank: two save, one and three load."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from esper.checkpoint.contents.sharded import load_sharded, save_sharded
from esper.checkpoint.format.manifest import read_manifest
from esper.checkpoint.format.reader import steps_kept
from esper.checkpoint.format.shard_files import orphans, verify_shards
from esper.distributed.fsdp.reshard import unshard
from esper.distributed.group import Group
from esper.errors import CheckpointError, StateError
from esper.storage.folder import FolderStorage
from esper.surgery.widen_layers import widen
from tests.distributed.ranks import take_part
from tests.distributed.sharding_worker import (
    Net,
    batch,
    grow,
    hybrid,
    loss_fn,
    plan_of,
    sharded,
    slices_of,
)

NAME = "step-00000005"


def run_of(net: nn.Module, backwards: bool = False) -> dict[str, Optimizer]:
    params = [p for p in net.parameters() if p.requires_grad]
    first = params[3::-1] if backwards else params[:4]  # state goes by name: their order does not matter
    return {"main": AdamW([{"params": first}, {"params": params[4:], "lr": 0.02}], lr=0.05)}


def widened() -> Net:
    """Return a fresh model in the shapes of the checkpoint: what the genome is for."""
    net, plan = Net(), plan_of("blocks.0", 7, 10)
    widen(net, plan, slices_of(net, plan))
    return net


def step(net: nn.Module, optimizers: dict[str, Optimizer], steps: range) -> None:
    for number in steps:
        loss_fn(net, batch(dist.get_rank(), number)).backward()
        optimizers["main"].step()
        optimizers["main"].zero_grad()


def by_name(net: nn.Module, optimizers: dict[str, Optimizer]) -> dict[str, Tensor]:
    """Return everything in full, by name."""
    named: dict[str, Any] = dict(net.state_dict())
    for name, parameter in net.named_parameters():
        for key, value in optimizers["main"].state.get(parameter, {}).items():
            named[f"{name}|{key}"] = value
    if (
        dist.is_initialized() and dist.get_rank()
    ):  # each process has running statistics of its own; rank 0's stay
        named = {name: value for name, value in named.items() if "running" not in name}
    return {n: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for n, v in named.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def folders(folder: Path) -> tuple[FolderStorage, Path]:
    return FolderStorage(folder.parent / "run"), folder.parent / "reference.safetensors"


def saved(rank: int, world: int, folder: Path) -> None:
    storage, reference = folders(folder)
    net = sharded(Net())
    optimizers = run_of(net)
    step(net, optimizers, range(3))
    resharding = unshard(net, optimizers)
    grow(net, optimizers)
    resharding.again()
    step(net, optimizers, range(3, 5))
    peers = Group()
    manifest = save_sharded(storage, 5, net, optimizers, rest={"epoch": 2, "alpha": 0.5}, peers=peers)
    before = by_name(net, optimizers)
    if rank == 0:
        save_file({k: v.contiguous() for k, v in before.items()}, reference)
        assert manifest.name == NAME
        assert steps_kept(storage) == [NAME]
        assert len(storage.names()) == 1 + world
        assert orphans(storage, [manifest]) == []
        assert len(orphans(storage, [])) == world
    dist.barrier()
    groups = [dict(g) for g in optimizers["main"].param_groups]
    step(net, optimizers, range(5, 8))

    again = sharded(widened())
    fresh = run_of(again)
    fresh["main"].param_groups[1]["lr"] = 1.0
    found = load_sharded(storage, NAME, again, fresh, peers=peers)
    assert found.state["rest"] == {"epoch": 2, "alpha": 0.5}
    assert [g["lr"] for g in fresh["main"].param_groups] == [g["lr"] for g in groups]
    equal(by_name(again, fresh), before)
    step(again, fresh, range(5, 8))
    equal(by_name(again, fresh), by_name(net, optimizers))


def same_step_twice(rank: int, world: int, folder: Path) -> None:
    """A second attempt never writes over the shards of the first."""
    storage = FolderStorage(folder.parent / "twice")
    net, peers = sharded(Net()), Group()
    optimizers = run_of(net)
    first = save_sharded(storage, 5, net, optimizers, peers=peers)
    kept = by_name(net, optimizers)
    step(net, optimizers, range(1))
    blocked = storage.folder / "blocked"
    if rank == 1:  # this process cannot write, so none has written
        blocked.write_text("a file, not a folder")
        mine = FolderStorage(blocked)
    else:
        mine = storage
    refused(lambda: save_sharded(mine, 5, net, optimizers, peers=peers), CheckpointError)
    load_sharded(storage, NAME, net, optimizers, peers=peers)
    equal({k: v for k, v in by_name(net, optimizers).items() if "|" not in k}, kept)
    second = save_sharded(storage, 5, net, optimizers, peers=peers)
    dist.barrier()
    if rank == 0:
        left = orphans(storage, [second])
        assert {s["name"] for s in first.summary["shards"]} < set(left)
        for name in left:
            storage.delete(name)
    dist.barrier()
    load_sharded(storage, NAME, net, optimizers, peers=peers)


def replicated(rank: int, world: int, folder: Path) -> None:
    """Of processes that hold the same part, one writes it."""
    storage, peers = FolderStorage(folder / "hybrid"), Group()
    net = sharded(Net(), mesh=hybrid())
    optimizers = run_of(net)
    step(net, optimizers, range(2))
    save_sharded(storage, 5, net, optimizers, peers=peers)
    dist.barrier()
    sizes = [
        (storage.folder / n / "tensors.safetensors").stat().st_size for n in storage.names() if n != NAME
    ]
    assert min(sizes) < 100 < max(sizes)
    again = sharded(Net())
    fresh = run_of(again)
    load_sharded(storage, NAME, again, fresh, peers=peers)
    equal(by_name(again, fresh), by_name(net, optimizers))


def refused(act: Any, kind: type[Exception]) -> str:
    try:
        act()
    except kind as error:
        return str(error)
    raise AssertionError("nothing was refused")


def loaded(rank: int, world: int, folder: Path) -> None:
    storage, reference = folders(folder)
    net = fully_shard(widened()) if world == 3 else sharded(widened())  # also otherwise grouped than it was
    optimizers = run_of(net, backwards=world == 3)
    load_sharded(storage, NAME, net, optimizers, peers=Group())
    found = by_name(net, optimizers)
    equal(found, {name: value for name, value in load_file(reference).items() if name in found})
    assert len(found) > 40
    step(net, optimizers, range(5, 7))


def from_one_that_was_not_sharded(rank: int, world: int, folder: Path) -> None:
    plain, peers = Net(), Group()
    before = run_of(plain)
    step(plain, before, range(2))
    other = FolderStorage(folder / "plain")
    peers.broadcast_tensors(
        [*plain.parameters(), *(v for s in before["main"].state.values() for v in s.values())]
    )
    peers.broadcast_tensors(list(plain.buffers()))
    save_sharded(other, 5, plain, before, peers=peers)
    dist.barrier()
    net = sharded(Net())
    after = run_of(net)
    load_sharded(other, NAME, net, after, peers=peers)
    equal(by_name(net, after), by_name(plain, before))
    assert isinstance(after["main"].state[net.head.weight]["exp_avg"], DTensor)


def damaged(rank: int, world: int, folder: Path) -> None:
    """What one process finds damaged, all refuse; and nothing was changed."""
    storage, _ = folders(folder)
    net, peers = sharded(widened()), Group()
    optimizers = run_of(net)
    kept = by_name(net, optimizers)
    shards = [name for name in storage.names() if name != NAME]
    manifest = read_manifest(storage, NAME)
    verify_shards(storage, manifest, peers)
    for victim in (*shards, NAME):
        for path in sorted((storage.folder / victim).iterdir()):
            whole = path.read_bytes()
            dist.barrier()
            for broken in (whole[:-1], b"", flipped(whole, len(whole) // 2), flipped(whole, 0), None):
                if rank == 0:
                    path.unlink() if broken is None else path.write_bytes(broken)
                dist.barrier()
                refused(lambda: load_sharded(storage, NAME, net, optimizers, peers=peers), CheckpointError)
                if victim != NAME:
                    refused(lambda: verify_shards(storage, manifest, peers), CheckpointError)
                equal(by_name(net, optimizers), kept)
                dist.barrier()
                if rank == 0:
                    path.write_bytes(whole)
                dist.barrier()
    one, other = (storage.folder / name / "tensors.safetensors" for name in shards)
    contents = one.read_bytes(), other.read_bytes()
    dist.barrier()
    if rank == 0:  # two sound shards in each other's place
        one.write_bytes(contents[1])
        other.write_bytes(contents[0])
    dist.barrier()
    assert refused(lambda: load_sharded(storage, NAME, net, optimizers, peers=peers), CheckpointError)
    dist.barrier()
    if rank == 0:
        one.write_bytes(contents[0])
        other.write_bytes(contents[1])
    dist.barrier()


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :]


def unfit(rank: int, world: int, folder: Path) -> None:
    storage, _ = folders(folder)
    net, peers = sharded(Net()), Group()
    kept = by_name(net, run_of(net))
    told = refused(lambda: load_sharded(storage, NAME, net, run_of(net), peers=peers), StateError)
    assert "'blocks.0.up.weight' has shape (10, 5) in the checkpoint and (7, 5) in the model" in told
    equal(by_name(net, run_of(net)), kept)
    net = widened()
    net.add_module("extra", nn.Linear(2, 2))
    told = refused(lambda: load_sharded(storage, NAME, net, run_of(net), peers=peers), StateError)
    assert "only the model has 'extra.weight'" in told


SAVING = {check.__name__: check for check in (saved, same_step_twice, replicated)}
LOADING = {check.__name__: check for check in (loaded, from_one_that_was_not_sharded, unfit, damaged)}

if __name__ == "__main__":
    take_part(SAVING if int(sys.argv[2]) == 2 else LOADING)
