"""plain_loop.py in several processes, with checkpoints; README.md beside it explains each number.

torchrun --nproc-per-node 2 --max-restarts 3 examples/ddp/train.py
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, random_split

import esper
from esper.checkpoint import Batches, CheckpointManager, Run
from esper.distributed.launch import join, leave


def loss_fn(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs), targets)


def main(folder: str = "runs/ddp", epochs: int = 40, fsdp: bool = False) -> dict[str, float]:
    if not dist.is_initialized():  # Ray has done it
        join()  # (1)
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # (2)
    images, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    train, held_out, test = random_split(digits, [1197, 240, 360])
    sampler = DistributedSampler(train, world, rank)  # (3)
    loader = DataLoader(train, batch_size=64 // world, sampler=sampler)
    probe = DataLoader(held_out, batch_size=240)  # (4)

    net = nn.Sequential(nn.Linear(64, 2), nn.ReLU(), nn.Linear(2, 10))
    model = fully_shard(net) if fsdp else DistributedDataParallel(net)  # (5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    steps = epochs * len(loader)
    config = {"budget": {"growth_factor": 16.0}}
    growth = esper.grow(model, optimizer, loss_fn, probe=probe, steps=steps, config=config, run_dir=folder)

    batches = Batches(loader)  # (6)
    run = Run(model, optimizer, growth=growth, batches=batches)
    with CheckpointManager(Path(folder) / "checkpoints", run, every=50) as manager:
        resumed = manager.resume()
        while batches.epoch < epochs:
            sampler.set_epoch(batches.epoch)
            for batch in batches:
                loss = loss_fn(model, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                growth.step(batch, loss)
                manager.step({"loss": loss})
            growth.rewrap()  # (7)
    growth.finish()
    if fsdp or rank == 0:  # (8)
        growth.save(Path(folder) / "model")

    inputs, targets = test[:]
    with torch.no_grad():
        accuracy = (model(inputs).argmax(1) == targets).float().mean().item()
    if rank == 0:
        for plan in growth.plans:
            print(f"{plan.site}: {plan.units} units more")
        print(net)
        print(f"accuracy {accuracy:.3f} after {manager.steps} steps in {world} processes")
    return {"accuracy": accuracy, "steps": manager.steps, "from": resumed.step if resumed else 0}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="plain_loop.py in several processes, with checkpoints")
    parser.add_argument("--folder", default="runs/ddp", help="of the run; several machines must share it")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--fsdp", action="store_true", help="shard the parameters instead of copying them")
    main(**vars(parser.parse_args()))
    leave()  # (9)
