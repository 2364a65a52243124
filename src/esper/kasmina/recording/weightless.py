"""Norms that hold no tensor: no parameter tells which calls are theirs, and they know their width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

KINDS = (_NormBase, nn.GroupNorm)


def is_weightless(module: nn.Module) -> bool:
    """Tell a norm over channels without weights and statistics."""
    if not isinstance(module, KINDS):
        return False
    return all(one is None for one in (*module._parameters.values(), *module._buffers.values()))


@contextmanager
def norms_noted(model: nn.Module, calls: Sized, norms: dict[int, str]) -> Iterator[None]:
    """Note which of the calls recorded meanwhile such norms made.

    Args:
        model: Model whose norms get hooks for the while.
        calls: Calls recorded so far.
        norms: Paths of norms by call; filled here.
    """
    begun: list[int] = []

    def begin(module: nn.Module, args: object) -> None:
        begun.append(len(calls))

    def ended(path: str) -> Callable[[nn.Module, object, object], None]:
        def end(module: nn.Module, args: object, result: object) -> None:
            norms.update(dict.fromkeys(range(begun.pop(), len(calls)), path))

        return end

    hooks: list[RemovableHandle] = []
    try:
        for path, module in model.named_modules():
            if is_weightless(module):
                hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(ended(path))]
        yield
    finally:
        for hook in hooks:
            hook.remove()
