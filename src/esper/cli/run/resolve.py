"""From a recipe's names to callables, checked before anything runs."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, SupportsFloat, TypedDict, TypeVar

from esper.cli.run.recipe import Call, Recipe
from esper.errors import ConfigError, EsperError, MissingExtraError, nearest
from esper.printable import quoted, shortened

if TYPE_CHECKING:  # torch takes seconds: a mistake in the config is told before
    from torch import Tensor, nn

Given = TypeVar("Given")

LOSSES = {"cross_entropy": "torch.nn.functional:cross_entropy", "mse": "torch.nn.functional:mse_loss"}
PARTS = ("train", "val", "probe")
MOST_TOLD = 500  # characters of somebody else's error


class Data(TypedDict):
    """Batches that can be iterated again; the probe is held out of training."""

    train: Iterable[object]
    val: Iterable[object] | None
    probe: Iterable[object]


def see_folder(path: Path, recipe: Recipe) -> None:
    """Let a config name the modules that lie beside it; what is installed goes before them.

    Raises:
        ConfigError: A module the config names lies beside it and is installed too.
    """
    folder = path.resolve().parent
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    for key, spec in recipe.calls().items():
        module, colon, _ = spec.call.partition(":")
        if colon:
            _refuse_clash(key, module.partition(".")[0], folder)


def _refuse_clash(key: str, name: str, folder: Path) -> None:
    """Refuse a module of which there are two: another one would run than the one that lies beside."""
    beside = [path for path in (folder / f"{name}.py", folder / name / "__init__.py") if path.is_file()]
    if not beside:
        return
    try:
        found = importlib.util.find_spec(name)
    except (ValueError, ImportError):  # what is loaded by that name says nothing of where it is from
        found = None
    origin = getattr(found, "origin", None)
    if origin is None or not Path(origin).exists() or not beside[0].samefile(origin):
        raise ConfigError(
            f"{key}: there are two modules {name!r}: {beside[0]}, beside the config, and "
            f"{origin or 'one that is built in'}, which is installed; rename the one beside the config"
        )


def resolve(name: str, key: str = "call") -> Callable[..., Any]:
    """Find ``module:callable``.

    Args:
        name: ``module:callable``, as the config writes it.
        key: The config's key, for messages.

    Raises:
        ConfigError: There is no such module, or the module has no such callable (the nearest is named).
    """
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute) or module_name.startswith("."):
        raise ConfigError(f"{key}: {quoted(name)} is not a module:callable, for example torch.optim:Adam")
    module = _imported(module_name, key)
    found = getattr(module, attribute, None)
    if not callable(found):
        known = [item for item, value in vars(module).items() if callable(value) and not item.startswith("_")]
        raise ConfigError(
            f"{key}: {quoted(name)}: {module_name} has no callable {quoted(attribute)}; "
            f"{nearest(attribute, known)}"
        )
    return found


def _imported(name: str, key: str) -> ModuleType:
    """Import a module the config names; whatever it raises is the config's mistake."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name + ".").startswith(error.name + "."):
            raise ConfigError(
                f"{key}: no module {quoted(error.name)}, neither beside the config nor installed"
            ) from None
        raise ConfigError(f"{key}: {name} needs {error.name}, which is not installed") from None
    except MissingExtraError:
        raise
    except (Exception, SystemExit) as error:  # somebody else's code runs while it is imported
        raise ConfigError(f"{key}: {quoted(name)} cannot be imported: {told(error)}") from error


def told(error: BaseException) -> str:
    """Say in one short line what somebody else's code raised, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    words = " ".join(shortened(str(error), MOST_TOLD).split())
    return f"{type(error).__name__}: {words}{where}"


def call(spec: Call, *positional: object, key: str = "call") -> object:
    """Call what a recipe names.

    Raises:
        ConfigError: The name cannot be found, does not take these arguments, or raises.
    """
    function = bound(resolve(spec.call, key), spec, positional, key=key)
    try:
        return function()
    except EsperError:
        raise
    except (Exception, SystemExit) as error:  # of the user's code, or for the arguments the config gives
        raise ConfigError(f"{key}: {spec.call} raised {told(error)}") from error


def called(key: str, spec: Call, kind: type[Given], needed: str, *positional: object) -> Given:
    """Call what a recipe names, and hold that it gives what is needed.

    Args:
        key: The config's key, for messages.
        spec: Its name and its arguments by name.
        kind: Class of what it must give.
        needed: Name of that, for messages.
        positional: Its arguments by place.

    Raises:
        ConfigError: It gives something else.
    """
    found = call(spec, *positional, key=key)
    if not isinstance(found, kind):
        raise ConfigError(f"{key}: {spec.call} gave a {type(found).__name__}; {needed} is needed")
    return found


def bound(
    function: Callable[..., Given],
    spec: Call,
    positional: tuple[object, ...],
    *,
    key: str = "call",
    later: int = 0,
) -> Callable[..., Given]:
    """Bind a call's arguments, and check that they fit before anything runs.

    Args:
        function: Callable whose arguments are bound.
        spec: Its name and its arguments by name.
        positional: Its arguments by place.
        key: The config's key, for messages.
        later: Number of arguments given by place whenever it is called; 0: whatever it still needs.

    Raises:
        ConfigError: They do not fit.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # built in C: it has no signature to check against, and says so itself
        return partial(function, *positional, **spec.arguments)
    bind = signature.bind if later else signature.bind_partial
    try:
        bind(*positional, *[None] * later, **spec.arguments)
    except TypeError as error:
        raise ConfigError(f"{key}: {spec.call}: {error}; it takes {signature}") from None
    return partial(function, *positional, **spec.arguments)


def loss_of(spec: Call, key: str = "loss") -> Callable[[nn.Module, Sequence[Tensor]], Tensor]:
    """Make ``(model, batch) -> loss`` of a recipe's loss; a named one reads a batch as (inputs, targets).

    Raises:
        ConfigError: There is no such loss (the nearest is named), or its arguments do not fit.
    """
    if ":" in spec.call:
        return bound(resolve(spec.call, key), spec, (), key=key, later=2)
    if spec.call not in LOSSES:
        raise ConfigError(
            f"no loss {quoted(spec.call)}; {nearest(spec.call, LOSSES)}; or name your own as module:callable"
        )
    function = bound(resolve(LOSSES[spec.call]), spec, (), key=key, later=2)
    return lambda model, batch: function(model(batch[0]), batch[1])


def metric_of(spec: Call, key: str = "metrics") -> Callable[[nn.Module, Sequence[Tensor]], float]:
    """Make ``(model, batch) -> number`` of a recipe's metric.

    Raises:
        ConfigError: There is no such metric (the nearest is named), or its arguments do not fit.
    """
    if ":" in spec.call:
        return measured(bound(resolve(spec.call, key), spec, (), key=key, later=2), spec, key)
    if spec.call == "accuracy":
        return accuracy
    if spec.call in LOSSES:
        loss = loss_of(spec, key)
        return lambda model, batch: float(loss(model, batch))
    known = ["accuracy", *LOSSES]
    raise ConfigError(
        f"no metric {quoted(spec.call)}; {nearest(spec.call, known)}; or name your own as module:callable"
    )


def measured(
    metric: Callable[..., SupportsFloat], spec: Call, key: str
) -> Callable[[nn.Module, Sequence[Tensor]], float]:
    """Return a metric of the user's own; what it raises, or gives instead of a number, names its key."""

    def measure(model: nn.Module, batch: Sequence[Tensor]) -> float:
        try:
            return float(metric(model, batch))
        except Exception as error:  # of the user's code
            raise ConfigError(f"{key}: {spec.call} raised {told(error)}") from error

    return measure


def accuracy(model: nn.Module, batch: Sequence[Tensor]) -> float:
    """Share of examples whose largest output is the target."""
    return float((model(batch[0]).argmax(dim=-1) == batch[1]).float().mean())  # (batch, classes) → (batch,)


def batches_of(data: object, spec: Call) -> Data:
    """Take train, val and probe out of what a recipe's data call returned.

    Raises:
        ConfigError: train or probe is missing.
    """
    found = data if isinstance(data, Mapping) else {name: getattr(data, name, None) for name in PARTS}
    for name in ("train", "probe"):
        if found.get(name) is None:
            raise ConfigError(
                f"data: {spec.call} returned a {type(data).__name__} without {name!r}; it must hold "
                f"{', '.join(PARTS)}: batches that can be iterated again, the probe held out of the training "
                "data (val may be None)"
            )
    return Data(train=found["train"], val=found.get("val"), probe=found["probe"])
