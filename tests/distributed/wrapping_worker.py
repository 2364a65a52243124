"""Checks of test_wrappings.py that run on every rank."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import ClassVar

from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from esper.distributed.collectives import ALONE
from esper.distributed.model_wrapper import WRAPPINGS, Optimizers
from esper.distributed.wrappings.replicated import Replicated
from esper.testing.wrapping import DEMANDS, check_wrapping
from tests.distributed.ranks import take_part


def sharded(host: nn.Module) -> nn.Module:
    for child in host.children():
        fully_shard(child)
    return fully_shard(host)


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "replicated": DistributedDataParallel,
    "sharded": sharded,
}


def keeps_the_contract(name: str, rank: int, world: int, folder: Path) -> None:
    found = check_wrapping(WRAPS[name], WRAPPINGS.get(name))
    assert found == [(demand.replace("_", " "), True) for demand in DEMANDS]


class Deaf(Replicated):
    """What the layers become is told to nobody."""

    def reshaping(self, optimizers: Optimizers) -> AbstractContextManager[None]:
        return nullcontext()


class Lonely(Replicated):
    """Asks nobody."""

    def __init__(self, wrapper: DistributedDataParallel, deadline: float) -> None:
        super().__init__(wrapper, deadline)
        self.peers = ALONE


class Untidy(Replicated):
    """Leaves its watchdog running."""

    left: ClassVar[list[Untidy]] = []

    def close(self) -> None:
        self.left.append(self)


FAULTS: dict[type[Replicated], set[str]] = {
    Deaf: {"layers become wider", "new parameters are trained by all"},
    Lonely: {"the peers are all that train it"},
    Untidy: {"closing lets go"},
}


def the_suite_finds_what_it_is_for(rank: int, world: int, folder: Path) -> None:
    for kind, missed in FAULTS.items():
        found = check_wrapping(DistributedDataParallel, kind)
        assert {name for name, held in found if not held} == missed, kind
    for one in Untidy.left:
        Replicated.close(one)


CHECKS = {name: partial(keeps_the_contract, name) for name in WRAPPINGS.names()}
CHECKS["suite"] = the_suite_finds_what_it_is_for

if __name__ == "__main__":
    take_part(CHECKS)
