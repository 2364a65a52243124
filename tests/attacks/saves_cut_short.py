"""Saves a model in children that die, or meet an error, at the k-th call to the system."""

import builtins
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

from esper.errors import EsperError
from esper.saving.save import load_into, save

CALLS = "mkdir rename open fsync rmdir unlink scandir stat lstat listdir".split()
MOST = 200  # calls of one save; it makes about 30


def model(fill: float) -> nn.Module:
    net = nn.Linear(2, 2)
    nn.init.constant_(net.weight, fill)
    return net


def armed(at: int, fault: str) -> list[int]:
    count = [0]

    def arm(place, name):
        real = getattr(place, name)

        def call(*args, **options):
            count[0] += 1
            if count[0] == at:
                if fault == "kill":
                    os._exit(9)
                raise KeyboardInterrupt if fault == "interrupt" else OSError(28, "No space left on device")
            return real(*args, **options)

        setattr(place, name, call)

    for name in CALLS:
        arm(os, name)
    arm(io, "open")
    builtins.open = io.open
    return count


def child(folder: Path, at: int, fault: str) -> int:
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    count = armed(at, fault)
    try:
        save(model(2), [], folder, card={})
    except (EsperError, KeyboardInterrupt):
        os._exit(3)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(4)
    os._exit(0 if count[0] >= at else 77)


def found(folder: Path) -> float | None:
    try:
        return float(load_into(model(0), folder).weight[0, 0])
    except EsperError:
        return None


def main(fault: str, earlier: bool) -> None:
    faults = []
    for at in range(1, MOST):
        with tempfile.TemporaryDirectory() as top:
            folder = Path(top) / "grown"
            if earlier:
                save(model(1), [], folder, card={})
            ended = child(folder, at, fault)
            if ended == 77:
                break
            after = found(folder)
            save(model(3), [], folder, card={})
            lies = sorted(os.listdir(top))
            right = after in ((1, 2) if earlier else (None, 2)) and ended in (0, 3, 9)
            if not right or found(folder) != 3 or lies != ["grown"]:
                faults.append([at, ended, after, lies])
    print(json.dumps({"calls": at - 1, "faults": faults}))


torch.set_num_threads(1)
main(sys.argv[1], sys.argv[2] == "earlier")
