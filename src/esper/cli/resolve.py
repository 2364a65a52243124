"""From a recipe's names to callables, checked before anything runs."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from esper.cli.recipe import Call
from esper.errors import ConfigError, nearest

LOSSES = {"cross_entropy": "torch.nn.functional:cross_entropy", "mse": "torch.nn.functional:mse_loss"}
PARTS = ("train", "val", "probe")


def see_folder(path: Path) -> None:
    """Let a config name the modules that lie beside it."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)


def resolve(name: str) -> Callable[..., Any]:
    """Find ``module:callable``.

    Raises:
        ConfigError: There is no such module, or the module has no such callable (the nearest is named).
    """
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        raise ConfigError(f"{name!r} is not a module:callable, for example torch.optim:Adam")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name + ".").startswith(error.name + "."):
            raise ConfigError(
                f"{name!r}: no module {error.name!r}, neither beside the config nor installed"
            ) from None
        raise ConfigError(f"{name!r}: {module_name} needs {error.name}, which is not installed") from None
    found = getattr(module, attribute, None)
    if not callable(found):
        known = [item for item, value in vars(module).items() if callable(value) and not item.startswith("_")]
        raise ConfigError(
            f"{name!r}: {module_name} has no callable {attribute!r}; {nearest(attribute, known)}"
        )
    return found


def call(spec: Call, *positional: Any) -> Any:
    """Call what a recipe names.

    Raises:
        ConfigError: The name cannot be found, or does not take these arguments.
    """
    return bound(resolve(spec.call), spec, positional)()


def bound(function: Callable[..., Any], spec: Call, positional: tuple[Any, ...]) -> Callable[..., Any]:
    """Bind a call's arguments, and check that they fit before anything runs."""
    try:
        inspect.signature(function).bind_partial(*positional, **spec.arguments)
    except TypeError as error:
        signature = inspect.signature(function)
        raise ConfigError(f"{spec.call}: {error}; it takes {signature}") from None
    except ValueError:  # built in C: it has no signature to check against, and says so itself when called
        pass
    return partial(function, *positional, **spec.arguments)


def loss_of(spec: Call) -> Callable[[Any, Any], Any]:
    """Make ``(model, batch) -> loss`` of a recipe's loss; a named one reads a batch as (inputs, targets)."""
    if ":" in spec.call:
        return bound(resolve(spec.call), spec, ())
    if spec.call not in LOSSES:
        raise ConfigError(
            f"no loss {spec.call!r}; {nearest(spec.call, LOSSES)}; or name your own as module:callable"
        )
    function = bound(resolve(LOSSES[spec.call]), spec, ())
    return lambda model, batch: function(model(batch[0]), batch[1])


def metric_of(spec: Call) -> Callable[[Any, Any], float]:
    """Make ``(model, batch) -> number`` of a recipe's metric."""
    if ":" in spec.call:
        return bound(resolve(spec.call), spec, ())
    if spec.call == "accuracy":
        return accuracy
    if spec.call in LOSSES:
        loss = loss_of(spec)
        return lambda model, batch: float(loss(model, batch))
    known = ["accuracy", *LOSSES]
    raise ConfigError(
        f"no metric {spec.call!r}; {nearest(spec.call, known)}; or name your own as module:callable"
    )


def accuracy(model: Any, batch: Any) -> float:
    """Share of examples whose largest output is the target."""
    return float((model(batch[0]).argmax(dim=-1) == batch[1]).float().mean())


def batches_of(data: Any, spec: Call) -> dict[str, Any]:
    """Take train, val and probe out of what a recipe's data call returned.

    Raises:
        ConfigError: train or probe is missing.
    """
    found = data if isinstance(data, Mapping) else {name: getattr(data, name, None) for name in PARTS}
    for name in ("train", "probe"):
        if found.get(name) is None:
            raise ConfigError(
                f"{spec.call} returned a {type(data).__name__} without {name!r}; it must hold "
                f"{', '.join(PARTS)}: batches that can be iterated again, the probe held out of the training "
                "data (val may be None)"
            )
    return {name: found.get(name) for name in PARTS}
