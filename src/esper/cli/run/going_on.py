"""Go on with a run: by what it was asked to do then, or by what it is asked to do now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esper.checkpoint.format.manifest import Manifest
from esper.cli.run.seeding import seed_all
from esper.cli.run.settings import COMPARED, differences
from esper.errors import ConfigError, StateError
from esper.tolaria.trainer import Trainer

SHOWN = 12  # differences an error lists
Difference = tuple[str, object, object]  # setting, what it was, what it is


@dataclass(frozen=True, slots=True)
class Fresh:
    """What the config asks of parts that a checkpoint overwrites."""

    groups: list[dict[str, Any]]  # of the optimizer
    scheduler: dict[str, object]

    @classmethod
    def of(cls, trainer: Trainer) -> Fresh:
        """Look at a trainer that was not resumed."""
        (optimizer,) = trainer.optimizers
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        return cls(groups, {} if trainer.scheduler is None else dict(vars(trainer.scheduler)))


def go_on(trainer: Trainer, *, override: bool = False) -> Manifest | None:
    """Resume, if there is something to resume from.

    Args:
        trainer: A trainer that has not begun; its settings are the manager's ``run.config``.
        override: True where settings that are not as they were hold, instead of being refused.

    Raises:
        ConfigError: Settings are not as they were; each is listed.
        StateError: The checkpoint is of another model.
    """
    assert trainer.manager is not None
    given, fresh, found = trainer.manager.run.config, Fresh.of(trainer), list[Difference]()
    told: list[str] = []

    def judge(saved: object) -> None:
        if not isinstance(saved, Mapping):
            told.append("the checkpoint does not say what it was asked to do; differences cannot be told")
            return
        was, now = ({name: one.get(name) for name in COMPARED} for one in (saved, given))
        found.extend(differences(was, now))
        if found and not override:
            raise ConfigError(refusal(found))
        if saved.get("epochs") != given["epochs"]:
            told.append(f"epochs was {saved.get('epochs')} and is {given['epochs']}")

    try:
        manifest = trainer.resume(judge)
    except (StateError, ConfigError):
        if trainer.manager.journal is not None:
            trainer.manager.journal.take_back()  # the run that is there has not gone on
        raise
    if manifest is None:
        return None
    if found:
        unapplied = apply(trainer, found, fresh)
        told += [shown(one) + (" (could not be applied)" if one[0] in unapplied else "") for one in found]
    if told:
        trainer.manager.messages.append(f"the run goes on from {manifest.name}, but {'; '.join(told)}")
    return manifest


def refusal(found: Sequence[Difference]) -> str:
    """Say what differs, and the ways on."""
    listed = [shown(one) for one in found[:SHOWN]]
    more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return (
        f"the run was asked for something else: {'; '.join([*listed, *more])}; to go on as asked now: "
        "--override; to begin anew: --fresh; or make the config what it was"
    )


def shown(difference: Difference) -> str:
    """Write one difference: old → new."""
    name, old, new = difference
    if name.startswith("code."):
        name = f"the code of {name.removeprefix('code.')}"
    was, now = ("not given" if one is None else f"{one!r:.60}" for one in (old, new))
    return f"{name}: {was} → {now}"


def apply(trainer: Trainer, found: Sequence[Difference], fresh: Fresh) -> set[str]:
    """Make what the config asks hold, where the checkpoint has said otherwise.

    Model, data, loss, metrics and growth's settings hold by themselves: the trainer was made of them.

    Returns:
        Names of what could not be made to hold.
    """
    unapplied = set()
    for name, old, new in found:
        part, _, argument = name.partition(".arguments.")
        key = argument.split(".")[0]
        if part == "optimizer" and not set_in_groups(trainer, key, fresh):
            unapplied.add(name)
        elif part == "scheduler":
            if key not in fresh.scheduler:
                unapplied.add(name)
            else:
                setattr(trainer.scheduler, key, fresh.scheduler[key])
        elif name == "seed" and isinstance(new, int):
            seed_all(new)
        elif name == "loaded.train.batches":
            follow(trainer, old, new)
    return unapplied


def follow(trainer: Trainer, old: object, new: object) -> None:
    """Stand at the same share of the data where its batches are of another number; None: it is not known."""
    if not isinstance(old, int) or not isinstance(new, int) or not old or not new:
        return
    if trainer.batches is not None:
        trainer.batches.index = trainer.batches.skip = trainer.batches.index * new // old


def set_in_groups(trainer: Trainer, key: str, fresh: Fresh) -> bool:
    """Set an option of the optimizer; under a scheduler a rate keeps its share of the one it began with."""
    (optimizer,) = trainer.optimizers
    if len(fresh.groups) != len(optimizer.param_groups) or any(key not in group for group in fresh.groups):
        return False
    for index, (group, asked) in enumerate(zip(optimizer.param_groups, fresh.groups, strict=True)):
        if key != "lr" or trainer.scheduler is None:
            group[key] = asked[key]
            continue
        begun, wanted = group["initial_lr"], asked["initial_lr"]
        group["lr"] = group["lr"] * (wanted / begun) if begun else asked["lr"]
        group["initial_lr"] = wanted
        rates = getattr(trainer.scheduler, "base_lrs", None)
        if isinstance(rates, list):
            rates[index] = wanted
    return True
