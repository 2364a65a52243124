"""Saves a growing model again and again until it is killed; notes what it begins to write and has written."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

from tests.attacks.staged import Loop


def main(top: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    loop = Loop("pair", "incubate")
    loop.step(31)  # a seed is being let in
    os.write(1, b"ready\n")
    for line in sys.stdin:  # one child for each line, which is killed by its parent at any moment
        folder = top / line.strip()
        pid = os.fork()
        if pid == 0:
            number = 0
            while True:
                number += 1
                torch.nn.init.constant_(loop.net[2].bias, number)
                (top / f"{folder.name}.begun").write_text(str(number))
                loop.growth.save(folder)
                (top / f"{folder.name}.ended").write_text(str(number))
        os.write(1, f"{pid}\n".encode())
        os.waitpid(pid, 0)
        os.write(1, b"over\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
