"""Inside the process: trains as the config says, writes down every step, and lets the fault come."""

from __future__ import annotations

import importlib
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors.torch import save_file

from esper.chaos.fault import Fault
from esper.chaos.spec import Marks, Spec
from esper.checkpoint import CheckpointManager, Storage
from esper.contracts import Event
from esper.distributed.launch import launched, leave
from esper.registry import Registry
from esper.tolaria.trainer import Trainer

FAULTS = Registry("esper.chaos.faults", group="esper.faults")
QUIET = ("survey", "alpha", "vitals", "epoch", "race", "decision")  # events that no verdict asks for


class Child:
    """What a fault may take hold of in the run's process.

    Attributes:
        spec: Record of what this process was told.
        rank: Number of this process among those that train together, from 0.
        draw: Random numbers that follow from the seed, the fault and the attempt.
        trainer: Set once the run is made; ``storage`` of a fault is asked before that.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec, self.rank = spec, int(os.environ.get("RANK", "0"))
        self.mark = Marks(spec.marks, spec.attempt, self.rank)
        self.draw = random.Random(f"{spec.seed}:{spec.fault}:{spec.attempt}")
        self.trainer: Trainer | None = None
        self.actions: list[Callable[[int], None]] = []
        self.struck = False

    @property
    def step(self) -> int:
        """Optimizer steps of the whole run so far, those of earlier processes included."""
        return 0 if self.trainer is None or self.trainer.manager is None else self.trainer.manager.steps

    @property
    def armed(self) -> Trainer:
        """The run's trainer, which exists once a fault is armed."""
        assert self.trainer is not None
        return self.trainer

    def strike(self, what: str) -> None:
        """Note that the fault comes now."""
        self.struck = True
        self.mark("fault", self.step, what=what)

    def each(self, action: Callable[[int], None]) -> None:
        """Have something done right after every optimizer step."""
        self.actions.append(action)

    def once(self, at: int, action: Callable[[], None]) -> None:
        """Have something done right after one optimizer step."""
        self.each(lambda step: action() if step == at else None)

    def see(self, event: Event) -> None:
        """Write an event down."""
        if event.kind not in QUIET:
            self.mark("event", event.step, event=event.kind, data=readable(event))

    def follow(self, trainer: Trainer) -> None:
        """Write down every optimizer step."""
        self.trainer = trainer
        first = next(iter(trainer.growth.run.parts.optimizers.values()))
        first.register_step_post_hook(self._stepped)

    def _stepped(self, *rest: object) -> None:
        self.mark("step", self.step)
        for action in self.actions:
            action(self.step)


def readable(event: Event) -> dict[str, object]:
    """Return an event's plain facts; what is not finite as text, and no nested ones."""
    plain: dict[str, object] = {
        k: v for k, v in event.data.items() if isinstance(v, str | int | bool) or v is None
    }
    return plain | {k: repr(v) for k, v in event.data.items() if isinstance(v, float)}


def train(spec: Spec) -> int:
    """Do what ``esper train --resume auto`` does, with a fault on the way."""
    relaunched = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    child = Child(replace(spec, attempt=spec.attempt + relaunched))
    child.mark("begun", 0)
    fault: Fault | None = None if spec.fault is None else FAULTS.get(spec.fault)()

    def wrap(storage: Storage) -> Storage:
        return storage if fault is None else fault.storage(child, storage)

    if fault is not None:
        fault.prepare(child)
    module, _, name = spec.maker.partition(":")
    make = getattr(importlib.import_module(module), name)
    more = {"epochs": spec.epochs, "growth": spec.growth, "every": spec.every}
    trainer: Trainer = make(Path(spec.config), Path(spec.run_dir), wrap=wrap, on_event=child.see, **more)
    child.follow(trainer)
    if fault is not None:
        fault.arm(child)
    resumed = trainer.resume()
    child.mark("resumed", 0 if resumed is None else resumed.step)
    model = trainer.fit()
    manager: CheckpointManager | None = trainer.manager
    kept = (0, 0) if manager is None else (manager.written, manager.failures)
    if child.rank == 0:
        save_file({name: t.detach().cpu().clone() for name, t in model.state_dict().items()}, spec.weights)
    child.mark("finished", child.step, written=kept[0], failures=kept[1])
    if launched():
        leave()
    return 0
