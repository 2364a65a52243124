"""Starts workers as processes of one group and runs their checks; a launch costs seconds, so one does many.

A worker calls :func:`take_part`. Every rank runs every check in the same order; a check that fails ends its
rank, because what the others would wait for does not come.
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

import torch
import torch.distributed as dist

PATIENCE = 30  # seconds for one collective


ROOT = Path(__file__).parents[2]


def launch(module: str, world: int, folder: Path, timeout: float = 170.0) -> list[dict[str, str]]:
    """Run a worker on so many ranks; return per rank what became of each check: "" or the traceback."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
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
    try:
        told = [worker.communicate(timeout=timeout)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    found = []
    for rank, text in enumerate(told):
        path = folder / f"told-{world}-{rank}.json"
        assert path.exists(), f"rank {rank} said nothing:\n{text}"
        found.append(json.loads(path.read_text(encoding="utf-8")))
    return found


def take_part(checks: dict[str, Callable[[int, int, Path], None]]) -> None:
    """Join the group, run the checks, write down what became of them and leave."""
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / f"store-{world}"), world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=PATIENCE)
    )
    told: dict[str, str] = {}
    for name, check in checks.items():
        try:
            check(rank, world, folder)
            told[name] = ""
        except Exception:  # whatever it is, the test shows it
            told[name] = traceback.format_exc()
            break
    (folder / f"told-{world}-{rank}.json").write_text(json.dumps(told), encoding="utf-8")
    if not any(told.values()):
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # a plain end aborts now and then inside gloo, after the work is done
