"""Random numbers of Esper's own passes: drawn from a generator of their own, in this thread only.

torch's default generator is one for the whole process. To re-seed it for a while, and to put it back, would
be seen by every thread that draws from it meanwhile. So calls that would draw from it are given another.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class OwnDraws(TorchDispatchMode):
    """Lets calls draw from generators of its own.

    Args:
        seed: Seed of these; None to go on from where the default ones are, which stay there.
    """

    def __init__(self, seed: int | None) -> None:
        super().__init__()
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def of(self, device: torch.device) -> torch.Generator:
        """Return the generator of a device."""
        if device not in self.generators:
            if self.seed is None:
                made = default_of(device).clone_state()
            else:
                made = torch.Generator(device)
                made.manual_seed(self.seed)
            self.generators[device] = made
        return self.generators[device]

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        """Run a call; one that draws, draws from here."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        given = next((one for one in args if isinstance(one, Tensor)), None)
        generator = self.of(torch.device(kwargs.get("device") or "cpu") if given is None else given.device)
        if func is aten.native_dropout.default:
            return dropped(generator, *args)
        drawing = DRAWING.get(func) or drawing_form(func)
        if drawing is None:
            return self.behind(func, args, kwargs, generator)
        return drawing(*args, **kwargs, generator=generator)

    def behind(
        self,
        func: OpOverload,
        args: tuple[object, ...],
        kwargs: dict[str, object],
        generator: torch.Generator,
    ) -> object:
        """Run a call that takes no generator: the default one stands where ours is, for just this call."""
        default = default_of(generator.device)
        with LOCK:
            before = default.get_state()
            try:
                default.set_state(generator.get_state())
                return func(*args, **kwargs)
            finally:
                generator.set_state(default.get_state())
                default.set_state(before)


LOCK = threading.RLock()
DRAWING: dict[OpOverload, OpOverload] = {}  # a call -> its form that takes a generator


def drawing_form(func: OpOverload) -> OpOverload | None:
    """Return the form of a call that takes a generator; None where there is none."""
    if any(argument.name == "generator" for argument in func._schema.arguments):
        found = func
    else:
        plain = func._overloadname
        name = "generator" if plain == "default" else f"{plain}_generator"
        found = getattr(func.overloadpacket, name, None)
    if found is not None:
        DRAWING[func] = found
    return found


def default_of(device: torch.device) -> torch.Generator:
    """Return a device's default generator."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


def dropped(generator: torch.Generator, x: Tensor, share: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """Drop as ``native_dropout`` does, which takes no generator."""
    if train is False or share == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    kept = torch.empty_like(x, dtype=torch.float32).bernoulli_(1 - share, generator=generator)
    scale = 0.0 if share == 1 else 1 / (1 - share)
    return x * kept.to(x.dtype) * scale, kept.bool()


ACTIVE = threading.local()


@contextmanager
def own_draws(seed: int | None) -> Iterator[None]:
    """Let this thread draw from generators of its own; one mode serves however many stand in each other."""
    outer: OwnDraws | None = getattr(ACTIVE, "mode", None)
    if outer is not None:
        before = outer.seed, outer.generators
        outer.generators = outer.generators if seed is None else {}
        outer.seed = outer.seed if seed is None else seed
        if seed is None:  # what is drawn inside is not drawn outside
            outer.generators = {device: one.clone_state() for device, one in before[1].items()}
        try:
            yield
        finally:
            outer.seed, outer.generators = before
        return
    ACTIVE.mode = OwnDraws(seed)
    try:
        with ACTIVE.mode:
            yield
    finally:
        ACTIVE.mode = None
