"""Starts workers as processes of one group and runs their checks; a launch costs seconds, so one does many.

A worker calls :func:`take_part`. Every rank runs every check in the same order. Where a check fails on any
rank, all meet in a new group for the next one, so that every failure is seen.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from time import monotonic

import torch
import torch.distributed as dist

PATIENCE = timedelta(seconds=30)  # for one collective


ROOT = Path(__file__).parents[2]


def launch(module: str, world: int, folder: Path, timeout: float = 170.0) -> list[dict[str, str]]:
    """Run a worker on so many ranks; return per rank what became of each check: "" or the traceback."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    end = monotonic() + timeout
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(world), str(folder)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    said = []
    for worker in workers:
        try:
            said.append(worker.communicate(timeout=max(0.0, end - monotonic()))[0])
        except subprocess.TimeoutExpired:
            worker.kill()
            said.append(f"{worker.communicate()[0]}\nkilled after {timeout:g} s")
    found = []
    for rank, text in enumerate(said):
        path = folder / f"told-{world}-{rank}.json"
        assert path.exists(), f"rank {rank} said nothing:\n{text}"
        found.append(json.loads(path.read_text(encoding="utf-8")))
    return found


def held(told: list[dict[str, str]], check: str) -> None:
    """Fail with what any rank says against a check; one that was not reached has not held."""
    found = {rank: one.get(check, "not reached") for rank, one in enumerate(told)}
    assert not any(found.values()), "\n".join(f"rank {rank}: {why}" for rank, why in found.items() if why)


def take_part(checks: dict[str, Callable[[int, int, Path], None]]) -> None:
    """Join the group, run the checks, write down what became of each and leave."""
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    board = dist.FileStore(str(folder / f"board-{world}"), world)  # beside the group, which may be broken
    board.set_timeout(2 * PATIENCE)
    told: dict[str, str] = {}
    for number, (name, check) in enumerate(checks.items()):
        if not dist.is_initialized():
            store = dist.FileStore(str(folder / f"store-{world}-{number}"), world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=PATIENCE)
        try:
            check(rank, world, folder)
            told[name] = ""
        except Exception:  # whatever it is, the test shows it
            told[name] = traceback.format_exc()
        (folder / f"told-{world}-{rank}.json").write_text(json.dumps(told), encoding="utf-8")
        board.set(f"{number}-{rank}", "failed" if told[name] else "held")
        if any(board.get(f"{number}-{one}") == b"failed" for one in range(world)):
            dist.destroy_process_group()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # a plain end aborts now and then inside gloo, after the work is done
