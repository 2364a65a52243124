"""What the user asks ``esper.grow`` for, one field per argument."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import nn
from torch.optim import Optimizer

from esper.batches.axes import Axes
from esper.batches.examples import LossFunction, PerExample
from esper.config import Config
from esper.kasmina.sites.sites import Sites


class Restorable(Protocol):
    """Has a state that can be taken and put back."""

    def state_dict(self) -> object:
        """Return it."""

    @property
    def load_state_dict(self) -> Callable[..., object]:
        """Take what ``state_dict`` gave."""


class Scheduler(Restorable, Protocol):
    """Moves a learning rate, as those of ``torch.optim.lr_scheduler`` do."""

    @property
    def step(self) -> Callable[..., object]:
        """Move it once."""


class Scaler(Restorable, Protocol):
    """Scales the loss for half precision, as ``torch.amp.GradScaler`` does."""

    def get_scale(self) -> float:
        """Return by how much."""


@dataclass(frozen=True)
class Request:
    """The arguments of ``esper.grow``, see there; lists where one may stand alone, settings loaded."""

    model: nn.Module
    optimizer: Optimizer | Mapping[str, Optimizer]
    loss_fn: LossFunction
    probe: Iterable[object] | Literal["stream"]
    example: object
    per_example: PerExample | None
    steps: int | None
    schedulers: Sequence[Scheduler]
    scaler: Scaler | None
    ema: Sequence[nn.Module] | nn.Module | None
    sites: Sites
    budget: Mapping[str, object] | None
    config: Config
    seed: int
    axes: Axes  # of ``batch_axis``
