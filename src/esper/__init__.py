"""Esper grows a PyTorch model while it trains."""

from __future__ import annotations

import random
from importlib import import_module
from typing import TYPE_CHECKING, Any

from esper import errors

if TYPE_CHECKING:  # for editors and type checkers; at run time a name is imported when it is first used
    from esper.config import Config, load_config
    from esper.errors import (
        BlueprintError,
        CheckpointError,
        CompileError,
        ConfigError,
        EsperError,
        FinishedError,
        ForgeError,
        KernelError,
        LossError,
        MissingExtraError,
        OptimizerError,
        ProbeError,
        ProcessError,
        RegistryError,
        RunError,
        SavedModelError,
        SiteError,
        StateError,
        StoreError,
        SurgeryError,
        TransitionError,
    )
    from esper.kasmina.morphable import MorphableModel, unwrap, wrap
    from esper.kasmina.summary import summary
    from esper.saving.save import load_into
    from esper.tolaria.growth import Growth, grow, plan
    from esper.tolaria.trainer import Trainer

    __version__: str

__all__ = [
    "BlueprintError",
    "CheckpointError",
    "CompileError",
    "Config",
    "ConfigError",
    "EsperError",
    "FinishedError",
    "ForgeError",
    "Growth",
    "KernelError",
    "LossError",
    "MissingExtraError",
    "MorphableModel",
    "OptimizerError",
    "ProbeError",
    "ProcessError",
    "RegistryError",
    "RunError",
    "SavedModelError",
    "SiteError",
    "StateError",
    "StoreError",
    "SurgeryError",
    "Trainer",
    "TransitionError",
    "__version__",
    "errors",
    "grow",
    "load_config",
    "load_into",
    "plan",
    "summary",
    "unwrap",
    "wrap",
]

# `import esper` must not pay for torch (1.7 s) or pydantic, so each name says where it lives.
_HOMES = {
    "Config": "esper.config",
    "Growth": "esper.tolaria.growth",
    "MorphableModel": "esper.kasmina.morphable",
    "Trainer": "esper.tolaria.trainer",
    "grow": "esper.tolaria.growth",
    "load_config": "esper.config",
    "load_into": "esper.saving.save",
    "plan": "esper.tolaria.growth",
    "summary": "esper.kasmina.summary",
    "unwrap": "esper.kasmina.morphable",
    "wrap": "esper.kasmina.morphable",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("esper-morph")
    if name.endswith("Error") and name in __all__:
        return getattr(errors, name)
    if name not in _HOMES:
        raise AttributeError(f"module 'esper' has no attribute {name!r}; {errors.nearest(name, __all__)}")
    state = random.getstate()  # what is imported on the way draws from it (rich), after the user's seed
    try:
        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    finally:
        random.setstate(state)
    return value


def __dir__() -> list[str]:
    return __all__
