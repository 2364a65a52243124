"""The process a fault is put into: ``python -m esper.chaos SPEC.json``."""

from __future__ import annotations

import importlib
import sys

from esper.chaos import clock, disk
from esper.chaos.spec import Spec


def main(path: str) -> int:
    """Prepare what must come before anything else is imported: the clocks, and the namespace of a disk."""
    spec = Spec.read(path)
    clock.install()
    if spec.namespace is not None:
        disk.join(spec.namespace)
    return importlib.import_module("esper.chaos.child").train(spec)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
