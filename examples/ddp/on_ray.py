"""train.py on a Ray cluster: python examples/ddp/on_ray.py; needs pip install 'esper-morph[ray]'."""

import argparse
from pathlib import Path

from train import main

from esper.integrations.ray.train import train

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="train.py on a Ray cluster, or on one that is started here")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/ddp"), help="of the run; all nodes share it"
    )
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    folder = given.folder.absolute()  # the processes begin elsewhere
    arguments = {"folder": str(folder), "epochs": given.epochs}
    print(train(main, arguments, workers=given.workers, restarts=3, storage=folder / "ray"))
