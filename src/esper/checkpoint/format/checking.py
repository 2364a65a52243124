"""What a checkpoint's manifest, state and genome must hold; asked once, when it is read.

Digests say that a checkpoint is as it was written. This says that it is one: whoever restores it meets no
missing key and no value of another kind, and whoever looks for a sound one steps back past it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from esper.checkpoint.format.run_state import RunState
from esper.errors import CheckpointError, SavedModelError
from esper.saving.genome import decode, plan_from
from esper.saving.genome_form import count, text

LATEST = 253402300799.0  # seconds since the epoch: the year 9999, the last one dates can name
Check: TypeAlias = Callable[[Any], bool]  # of a value that was read: anything at all


def require_facts(facts: Mapping[str, object], name: str) -> None:
    """Check what a manifest says, but for its format, parts and digest.

    Raises:
        CheckpointError: A field is not of its kind.
    """
    checks: dict[str, Check] = {
        "step": count,
        "time": lambda value: _number(value) and 0 <= value <= LATEST,
        "code": lambda value: isinstance(value, dict) and text(*value.values()),
        "metrics": lambda value: isinstance(value, dict) and all(map(_known, value.values())),
        "summary": lambda value: isinstance(value, dict) and not odd(value, SUMMARY, optional=True),
    }
    if wrong := odd(facts, checks):
        raise CheckpointError(f"{name}: the manifest's {wrong} is not of its kind")


def require_state(state: object, step: int, name: str) -> RunState:
    """Check a run's state, as :func:`capture_run` makes it, and return it under its type.

    Raises:
        CheckpointError: A part is missing or not of its kind, or it is of another step.
    """
    if not isinstance(state, dict):
        raise CheckpointError(f"{name}: the state is a {type(state).__name__}, no mapping")
    alone = "rest" in state  # what save_sharded() keeps: a model and its optimizers, of no run
    checks = {key: STATE[key] for key in ("modules", "optimizers")} if alone else STATE
    if wrong := odd(state, checks):
        raise CheckpointError(f"{name}: the state's {wrong} is missing, or not of its kind")
    if alone:
        return cast("RunState", state)
    if state["steps"] != step:
        raise CheckpointError(f"{name}: the state is of step {state['steps']}, its manifest of step {step}")
    growth, processes = state["growth"], state.get("processes")
    early = growth is not None and growth.get("early") is not None
    if processes is not None and not (
        isinstance(processes, list) and all(_process(one, early) for one in processes)
    ):
        raise CheckpointError(f"{name}: what each process knew alone is not of its kind")
    if (wrong := _odd_stream(state["randomness"])) is not None:
        raise CheckpointError(f"{name}: the state of the {wrong} random stream is not one")
    return cast("RunState", state)


def require_genome(genome: bytes, state: RunState, name: str) -> None:
    """Check a genome, and that the growth of the state is the same.

    Raises:
        CheckpointError: It cannot be read, or is another.
    """
    if "rest" in state:  # the genome is the caller's own then
        return
    growth = state["growth"]
    try:
        plans = decode(genome)[1]
        grown = [plan_from(plan) for plan in ([] if growth is None else growth["plans"])]
    except (SavedModelError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{name}: {error}") from error
    if plans != grown:
        raise CheckpointError(f"{name} contradicts itself: its genome and its growth hold other plans")


def odd(given: Mapping[str, object], checks: Mapping[str, Check], *, optional: bool = False) -> str | None:
    """Name the first value that is missing or fails its check; None: there is none."""
    for key, check in checks.items():
        if key not in given:
            if not optional:
                return key
        elif not check(given[key]):
            return key
    return None


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # so neither infinite nor NaN


def _known(value: object) -> bool:
    return value is None or _number(value)


def _maybe(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _mapping(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and text(*value) and all(map(check, value.values()))


def _module(value: object) -> bool:
    return (
        isinstance(value, dict)
        and not odd(
            value,
            {
                "state": _mapping(lambda one: True),
                "buffers": _mapping(lambda one: True),
                "frozen": lambda one: isinstance(one, list) and text(*one),
            },
        )
        and _owned(value)
    )


def _owned(module: Mapping[str, Any]) -> bool:
    """Tell whether the buffers a module says are its own are in its state."""
    owned = module.get("owned", [])
    return isinstance(owned, list) and text(*owned) and module["state"].keys() >= set(owned)


def _optimizer(value: object) -> bool:
    return isinstance(value, dict) and not odd(
        value,
        {
            "kind": text,
            "groups": lambda one: isinstance(one, list) and all(map(_group, one)),
            "state": _mapping(lambda one: isinstance(one, dict)),
        },
    )


def _group(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("names"), list)
        and text(*value["names"])
        and isinstance(value.get("settings"), dict)
    )


def _batches(value: object) -> bool:
    known = isinstance(value, dict) and not odd(value, {"epoch": count, "index": count})
    if not known or ("length" in value and not _maybe(count)(value["length"])):
        return False
    began = value.get("began")
    return not value["index"] if began is None else isinstance(began, dict) and _odd_stream(began) is None


def _growth(value: object) -> bool:
    if not isinstance(value, dict) or not count(value.get("version")):
        return False
    if value["version"] not in (2, 3):  # growth itself says which version it reads
        return True
    fields = GROWTH if value["version"] == 2 else GROWTH | SEVERAL
    return not odd(value, fields) and not odd(value, {"early": _maybe(_early)}, optional=True)


def _early(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("evidence"), dict)


def _process(value: object, early: bool) -> bool:
    """Tell whether this is what one of several processes knew alone, in a run that grew early or not."""
    if not isinstance(value, dict) or not isinstance(value.get("evidence", {}), dict):
        return False
    return (early or not value.get("evidence")) and not odd(
        value,
        {
            "growth": _maybe(lambda one: isinstance(one, dict)),
            "buffers": _mapping(_mapping(lambda one: True)),
            "others": STATE["others"],
            "batches": _maybe(_batches),
            "randomness": lambda one: _odd_stream(one) is None,
        },
    )


def _odd_stream(streams: object) -> str | None:
    """Set each stream in one of its kind that nobody draws from; name the first that cannot be."""
    if not isinstance(streams, dict) or not isinstance(streams.get("generators"), dict):
        return "whole"
    if not (streams.get("cuda", 0) is None or isinstance(streams.get("cuda"), list)):
        return "CUDA"
    setters: dict[str, Callable[[Any], object]] = {
        "python": random.Random().setstate,
        "numpy": np.random.RandomState().set_state,
        "torch": torch.Generator().set_state,
    }
    for kind, put in setters.items():
        try:
            put(streams[kind])
        except Exception:  # each library has its own
            return kind
    return None


SUMMARY: dict[str, Check] = {
    "model": text,
    "parameters": count,
    "grown": count,
    "awake": lambda value: isinstance(value, list) and text(*value),
    "epoch": _maybe(count),
    "batch": _maybe(count),
    "run": _maybe(text),
    "config": _maybe(text),
    "shards": lambda value: isinstance(value, list) and all(map(_shard, value)),
}
GROWTH: dict[str, Check] = {
    "sites": _mapping(count),
    "plans": lambda value: isinstance(value, list),
    "layout": _mapping(lambda one: isinstance(one, Tensor)),
    "tamiyo": lambda value: isinstance(value, dict),
    "streams": lambda value: isinstance(value, dict),
    "cost": lambda value: isinstance(value, dict),
    "looks": count,
    "counters": lambda value: isinstance(value, list) and len(value) == 4 and all(map(count, value)),
    "losses": lambda value: isinstance(value, list) and all(type(one) is float for one in value),
    "cool_until": lambda value: type(value) is int,
    "pending": lambda value: isinstance(value, list),
    "batches": lambda value: isinstance(value, list),
    "trial": _maybe(lambda value: isinstance(value, dict)),
}
SEVERAL: dict[str, Check] = {  # where several seeds may be awake
    "others": lambda value: isinstance(value, list) and all(isinstance(one, dict) for one in value),
    "mixed": lambda value: isinstance(value, list) and all(type(one) is float for one in value),
}
STATE: dict[str, Check] = {
    "steps": count,
    "config": lambda value: True,
    "growth_config": _maybe(lambda value: isinstance(value, dict)),
    "growth": _maybe(_growth),
    "modules": lambda value: _mapping(_module)(value) and "" in value,
    "optimizers": lambda value: _mapping(_optimizer)(value) and bool(value),
    "others": _mapping(lambda value: True),
    "batches": _maybe(_batches),
    "randomness": lambda value: isinstance(value, dict),
}


def _shard(value: object) -> bool:
    return isinstance(value, dict) and not odd(
        value, {"name": text, "size": count, "sha256": lambda one: text(one) and len(one) == 64}
    )
