"""See how blocks are called in one run: in which order, with what, and what one hands to the next.

Forward hooks last as long as the run; unlike seams they show keyword arguments too, and switch off the fast
path of ``nn.TransformerEncoderLayer``, which calls none of its children.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from esper.kasmina.recording.recorder import Refused

PLAIN = (Tensor, bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass(slots=True)
class RecordedCall:
    """What a block was called with, and under which autocast; ``slot`` is the leaf that it adds to."""

    leaves: list[object]
    nest: TreeSpec
    slot: int
    autocast: tuple[str, torch.dtype, bool]

    def call(self, block: nn.Module, x: Tensor) -> Tensor:
        """Call a block with another input and everything else as it was.

        Raises:
            Refused: It returns no floating-point tensor.
        """
        leaves = [leaf if isinstance(leaf, PLAIN) else copy.deepcopy(leaf) for leaf in self.leaves]
        leaves[self.slot] = x
        args, kwargs = tree_unflatten(leaves, self.nest)
        device, dtype, enabled = self.autocast
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            y = floating(block(*args, **kwargs))
        if y is None:
            raise Refused("it returns no floating-point tensor")
        return y

    def without(self, index: int) -> RecordedCall:
        """Return the same call with None in one place."""
        return replace(self, leaves=[*self.leaves[:index], None, *self.leaves[index + 1 :]])


def floating(tree: object) -> Tensor | None:
    """Return the first floating-point tensor of a nest."""
    leaves = tree_flatten(tree)[0]
    return next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()), None)


def recorded_call(args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[RecordedCall, Tensor]:
    """Keep a call's arguments but the input itself, which is returned beside them.

    Raises:
        Refused: There is no floating-point tensor, or something that cannot be copied.
    """
    leaves, nest = tree_flatten((args, kwargs))
    slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not slots:
        raise Refused("it reads no floating-point tensor")
    x = leaves[slots[0]]
    kept: list[object] = []
    for index, leaf in enumerate(leaves):
        if index == slots[0]:
            kept.append(None)
        elif isinstance(leaf, Tensor):
            kept.append(leaf.detach())
        else:
            try:
                kept.append(leaf if isinstance(leaf, PLAIN) else copy.deepcopy(leaf))
            except (RuntimeError, TypeError, NotImplementedError) as error:
                raise Refused(
                    f"it is called with a {type(leaf).__name__} that has no copy: {error}"
                ) from None
    device = x.device.type
    cast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return RecordedCall(kept, nest, slots[0], cast), x


@dataclass(slots=True)
class Visits:
    """One run as the blocks of one stack saw it; only the last block's call is kept."""

    order: list[int] = field(default_factory=list)
    reason: str | None = None
    given: RecordedCall | None = None
    x: Tensor | None = None  # the last block's input and output
    y: Tensor | None = None
    passed: Tensor | None = None  # what the block before returned, itself
    version: int = 0

    def enter(
        self, index: int, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        """Note a call; a hook."""
        self.order.append(index)
        try:
            self.given, x = recorded_call(args, kwargs)
        except Refused as refusal:
            self.reason = str(refusal)
            return
        before = self.passed
        if before is not None and (
            before._version != self.version or before.shape != x.shape or not torch.equal(before, x)
        ):
            self.reason = "something stands between its blocks"
        self.x = x.detach().clone()

    def leave(self, index: int, module: nn.Module, args: object, result: object) -> None:
        """Note what a call returned; a hook."""
        self.passed = floating(result)
        if self.passed is None:
            self.reason = "a block returns no floating-point tensor"
            return
        self.version, self.y = self.passed._version, self.passed.detach().clone()
        if self.x is not None and self.x.shape != self.y.shape:
            self.reason = f"a block makes {tuple(self.y.shape)} of {tuple(self.x.shape)}"

    def refusal(self, blocks: int) -> str | None:
        """Return why this is no stack."""
        if self.order != list(range(blocks)):
            if len(self.order) > blocks:
                return "a block is called more than once in a pass"
            return "its blocks are not called as modules, each once and in order"
        return self.reason


@contextmanager
def watching(stacks: Sequence[Sequence[nn.Module]]) -> Iterator[list[Visits]]:
    """Watch the blocks of several stacks while the context lasts."""
    seen = [Visits() for _ in stacks]
    with ExitStack() as hooks:
        for visits, blocks in zip(seen, stacks, strict=True):
            for index, block in enumerate(blocks):
                first = block.register_forward_pre_hook(partial(visits.enter, index), with_kwargs=True)
                hooks.callback(first.remove)
                hooks.callback(block.register_forward_hook(partial(visits.leave, index)).remove)
        yield seen


def visit(stacks: Sequence[Sequence[nn.Module]], run: Callable[[], object]) -> list[Visits]:
    """Run once and tell what each stack saw."""
    with torch.no_grad(), watching(stacks) as seen:
        run()
    return seen
