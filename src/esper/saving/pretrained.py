"""Models that are built from a config, as Hugging Face's are: the config follows what grew, where it can.

``from_pretrained`` builds ``type(model)(config)`` and loads the weights into that, so after growth a config
must say the new sizes. Which of its numbers rules which layer is nowhere written down: numbers that have the
old size are set to the new one, the model is built from that on the meta device, and what comes nearer to the
grown model's shapes is kept. In the end all shapes must be equal, and so must what both say of one batch: two
heads of twelve have the shapes of three of eight. One number often rules several layers; where these have
grown to different sizes no config can say it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from esper.kasmina.morphable import MISTAKES
from esper.surgery.isolation.contexts import examining, same_randomness

MOST = 64  # models built in search of a config
DEEP = 3  # configs in configs
WAYS = 8  # of setting numbers that give the wanted shapes
ROUNDING = 1e-5  # of the largest value, between what the grown model says and the one built anew
Shapes = dict[str, tuple[int, ...]]


class Number(NamedTuple):
    """One number of a config, or of a config within it: as it is, or as it may have become."""

    path: tuple[str, ...]
    value: int | None


def follow(model: nn.Module, run: Callable[[], object]) -> list[str]:
    """Let the configs in a grown model say what it is by now.

    Args:
        model: The host; it may be such a model or hold some.
        run: Calls it on a batch.

    Returns:
        For each that no config says rightly one sentence: what its config cannot say, and what to do.
    """
    return [why for path, one in built_from_configs(model) if (why := settle(model, path, one, run))]


def built_from_configs(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """List the outermost modules that ``from_pretrained`` would build from their config."""
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") or not outer for outer in found)
        config = vars(module).get("config")
        able = callable(getattr(type(module), "from_pretrained", None)) and hasattr(config, "__dict__")
        if able and not inside:
            found.append(path)
            yield path, module


def settle(host: nn.Module, path: str, model: nn.Module, run: Callable[[], object]) -> str:
    """Find and set the numbers of one model's config; returns why that cannot be, or ""."""
    wanted = shapes_of(model)
    kind, config = type(model).__name__, vars(model)["config"]
    try:
        with same_randomness(0):
            changes, missing = said(host, model, wanted, run)
    except MISTAKES as error:
        return advice(kind, f"a {kind} built from it raised {type(error).__name__}: {error}")
    if missing:
        return advice(kind, f"no number of it gives {missing[0]}")
    for change in changes:
        put(config, change.path, change.value)
    return ""


def said(
    host: nn.Module, model: nn.Module, wanted: Shapes, run: Callable[[], object]
) -> tuple[list[Number], list[str]]:
    """Find numbers that give the wanted shapes and a model that computes the same, or say what none gives.

    Several may give the shapes, as the number of heads and their size do: then each is left out in turn.
    Where none is to be changed the model is compared as well: a block that has come may be of another kind
    than what a config gives its place.
    """
    config = vars(model)["config"]
    now = shapes_of(built(model, config))
    tried_without: list[frozenset[tuple[str, ...]]] = [frozenset()]
    first: list[str] = []
    for barred in tried_without:
        trial = copy.deepcopy(config)
        changes, missing = search(model, trial, wanted, now, barred)
        if not missing and same(host, model, built(model, trial), run):
            return changes, []
        first = first or missing or [f"a {type(model).__name__} that computes the same"]
        others = [barred | {change.path} for change in changes] if not missing else []
        tried_without += [one for one in others if one not in tried_without and len(tried_without) < WAYS]
    return [], first


def advice(kind: str, why: str) -> str:
    """Say what a config cannot, and what to do."""
    return (
        f"the config of this {kind} cannot say how it grew, so from_pretrained would not load what "
        f"save_pretrained writes: {why}; keep the model with growth.save(folder), and load it with "
        f"esper.load_into({kind}(config), folder) or the folder's rebuild.py"
    )


def built(model: nn.Module, config: object) -> nn.Module:
    """Build a model without memory or time from a config that stays what it is."""
    with torch.device("meta"):
        made = type(model)(copy.deepcopy(config))
    assert isinstance(made, nn.Module)
    return made


def shapes_of(model: nn.Module) -> Shapes:
    """List the shapes of parameters and buffers, those that are not saved too."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tuple(tensor.shape) for name, tensor in named}


def search(
    model: nn.Module,
    config: object,
    wanted: Shapes,
    now: Shapes,
    barred: Container[tuple[str, ...]] = (),
) -> tuple[list[Number], list[str]]:
    """Number a config until a model built from it has the wanted shapes.

    Returns:
        The changes, and what still differs: tensors with their shapes.
    """
    changes: list[Number] = []
    tries, wrong = 0, different(wanted, now)
    progress = True
    while wrong and progress and wanted.keys() == now.keys():
        progress = False
        for change in candidates(config, wanted, now):
            before = value_at(config, change.path)
            if tries >= MOST:
                break
            if change.path in barred:
                continue
            tries += 1
            made = tried(model, config, change)
            left = different(wanted, made)
            if left.keys() < wrong.keys():
                changes, wrong, now, progress = [*changes, change], left, made, True
                break
            if value_at(config, change.path) is not before:  # a frozen one was never changed
                put(config, change.path, before)  # what it was, None too
    named = wrong or {name: wanted.get(name) for name in wanted.keys() ^ now.keys()}
    return changes, [f"{name!r} the shape {shape}" for name, shape in named.items()]


def tried(model: nn.Module, config: object, change: Number) -> Shapes:
    """Set a number and return the shapes of what is built then; none where it is refused."""
    try:
        put(config, change.path, change.value)
        return shapes_of(built(model, config))
    except Exception:  # the config's and the model's own classes say no as they like
        return {}


def different(wanted: Shapes, made: Shapes) -> Mapping[str, tuple[int, ...] | None]:
    """Return the wanted shapes that are others."""
    return {name: shape for name, shape in wanted.items() if made.get(name) != shape}


def candidates(config: object, wanted: Shapes, now: Shapes) -> list[Number]:
    """List numbers that may have become others, the likeliest first.

    A number that is the size of an axis which has grown is likelier than one that divides it, as the number
    of heads does, and that than one that is not given, which stands for a multiple of another.
    """
    sizes = sorted(
        {
            (old, new)
            for name, shape in wanted.items()
            if len(shape) == len(now.get(name, ()))
            for old, new in zip(now[name], shape, strict=True)
            if old != new
        }
    )
    entries = list(entries_of(config))
    equal = [Number(e.path, new) for old, new in sizes for e in entries if e.value == old]
    parts = [
        Number(e.path, e.value * new // old)
        for old, new in sizes
        for e in entries
        if e.value and e.value != old and old % e.value == 0 and e.value * new % old == 0
    ]
    unset = [Number(e.path, new) for old, new in sizes for e in entries if e.value is None]
    return list(dict.fromkeys((*equal, *parts, *unset)))


def entries_of(config: object, path: tuple[str, ...] = ()) -> Iterator[Number]:
    """List the whole numbers of a config and of configs in it, and what is not given."""
    for name, value in vars(config).items():
        own = (*path, name)
        if name.startswith("_"):
            continue
        if value is None or type(value) is int:
            yield Number(own, value)
        elif isinstance(value, list) and value and all(type(one) is int for one in value):
            yield from (Number((*own, str(index)), one) for index, one in enumerate(value))
        elif hasattr(value, "to_dict") and hasattr(value, "__dict__") and len(own) < DEEP:
            yield from entries_of(value, own)


def value_at(config: object, path: tuple[str, ...]) -> object:
    """Return what lies at a path of a config."""
    for name in path:
        config = config[int(name)] if isinstance(config, list) else getattr(config, name)
    return config


def put(config: object, where: tuple[str, ...], value: object) -> None:
    """Set a number of a config."""
    *path, last = where
    holder = value_at(config, tuple(path))
    if isinstance(holder, list):
        holder[int(last)] = value
    else:
        setattr(holder, last, value)


def same(host: nn.Module, model: nn.Module, made: nn.Module, run: Callable[[], object]) -> bool:
    """Tell whether a model built anew, with the same weights, says the same where the host calls it."""
    made.load_state_dict(model.state_dict(), assign=True)
    modules = dict(made.named_modules())
    for name, buffer in model.named_buffers():  # those that are not saved are on the meta device still
        path, _, leaf = name.rpartition(".")
        modules[path]._buffers[leaf] = buffer.clone()
    made.eval()
    pairs: list[tuple[list[Tensor], list[Tensor]]] = []

    def compare(
        module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object
    ) -> None:
        pairs.append((tensors(output), tensors(made(*args, **kwargs))))

    with ExitStack() as stack:
        stack.callback(model.register_forward_hook(compare, with_kwargs=True).remove)
        stack.enter_context(examining(host, seed=0))
        run()
    return bool(pairs) and all(
        len(mine) == len(theirs) and all(map(close, mine, theirs)) for mine, theirs in pairs
    )


def tensors(tree: object) -> list[Tensor]:
    """List the floating-point tensors of a nest."""
    return [one for one in tree_leaves(tree) if isinstance(one, Tensor) and one.is_floating_point()]


def close(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are equal but for rounding."""
    if one.shape != other.shape:
        return False
    allowed = ROUNDING * float(one.abs().max()) if one.numel() else 0.0
    return bool(((one - other).abs() <= allowed).all())
