"""Which parameters of a block must be zero for it to return its input exactly; tried on a copy, not guessed.

All at zero make a block with a plain shortcut the identity. From there each tensor gets its values back, in
the order in which the block uses them, unless the identity is lost: what stays at zero is the last layer of
each branch, or the norm behind it. A block that also scales its shortcut is searched from the other side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from esper.kasmina.recording.recorder import Refused, record
from esper.kasmina.recording.visits import RecordedCall
from esper.surgery.isolation.contexts import same_randomness
from esper.surgery.isolation.seam import is_open

Group = tuple[str, ...]  # parameters that are zero together
FAILURES = (RuntimeError, ValueError, TypeError, IndexError)  # what a block may say to another input
POST_NORM = "no choice of zeros makes a block return its input exactly"


def is_identity(block: nn.Module, given: RecordedCall, x: Tensor) -> bool:
    """Tell whether a block returns its input, bit for bit, in evaluation and in training with dropout on.

    Args:
        block: A copy; its modes and buffers change.
        given: Arguments it is called with besides its input.
        x: Input that it would read, (batch, …).
    """
    with torch.no_grad(), same_randomness(0):
        for mode in (False, True):
            y = given.call(block.train(mode), x.clone())
            if y.shape != x.shape or y.dtype != x.dtype or not torch.equal(y, x):
                return False
    return True


def zeros_of(block: nn.Module, given: RecordedCall, x: Tensor) -> tuple[str, ...]:
    """Return the parameters to zero, in the order of use; none can be left out.

    Args:
        block: A copy of the block, which is spoilt.
        given: Arguments it is called with besides its input.
        x: Input of a new block: the last block's output, (batch, …).

    Raises:
        Refused: There is no such choice; says why.
    """
    with torch.no_grad():
        for parameter in block.parameters():  # what starts at zero would look as if it need not
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1, generator=_generator(parameter))
    search = Search(block, given, x)
    try:
        if search.holds(()):
            raise Refused("a block returns its input whatever its weights are")
        groups = search.used()
        found = search.fewest(groups) if search.holds(groups) else search.smallest(groups)
    except FAILURES as error:
        raise Refused(f"a block cannot be called alone: {error}") from None
    if found is None:
        raise Refused(f"{POST_NORM}: {search.why(groups)}")
    return tuple(name for group in found for name in group)


def _generator(parameter: Tensor) -> torch.Generator:
    return torch.Generator(parameter.device).manual_seed(0)


class Search:
    """Tries choices of zeros on one block."""

    def __init__(self, block: nn.Module, given: RecordedCall, x: Tensor) -> None:
        self.block, self.given, self.x = block, given, x
        self.values = {name: p.detach().clone() for name, p in block.named_parameters()}

    def holds(self, zeroed: Sequence[Group]) -> bool:
        """Tell whether the block is the identity with these at zero and all others as they are."""
        chosen = {name for group in zeroed for name in group}
        with torch.no_grad():
            for name, parameter in self.block.named_parameters():
                if name in chosen:
                    parameter.zero_()
                else:
                    parameter.copy_(self.values[name])
        return is_identity(self.block, self.given, self.x)

    def used(self) -> list[Group]:
        """List weight and bias of each layer, and every other parameter alone, in the order of use."""
        with torch.no_grad(), same_randomness(0):
            calls = record(self.block.train(), lambda: self.given.call(self.block, self.x.clone())).calls
        order = {n: None for call in calls for n in call.parameters if n in self.values}
        return list(dict.fromkeys(self.group(name) for name in order))

    def group(self, name: str) -> Group:
        """Return what is zero together with a parameter."""
        path, _, leaf = name.rpartition(".")
        own = [n for n, p in self.block.get_submodule(path)._parameters.items() if p is not None]
        alone = leaf not in {"weight", "bias"}
        return (name,) if alone else tuple(f"{path}.{n}".lstrip(".") for n in own if n in {"weight", "bias"})

    def fewest(self, groups: Sequence[Group]) -> list[Group]:
        """Leave out what need not be zero, first what is used first."""
        kept = list(groups)
        for group in groups:
            rest = [other for other in kept if other is not group]
            if rest and self.holds(rest):
                kept = rest
        return kept

    def smallest(self, groups: Sequence[Group]) -> list[Group] | None:
        """Try every layer alone, then every two, the last used first; matrices only."""
        matrices = [group for group in reversed(groups) if self.values[group[0]].dim() > 1]
        for size in (1, 2):
            for chosen in combinations(matrices, size):
                if self.holds(chosen):
                    return sorted(chosen, key=groups.index)
        return None

    def why(self, groups: Sequence[Group]) -> str:
        """Say what stands behind the sum, if it can be told."""
        last = self.block.get_submodule(groups[-1][0].rpartition(".")[0]) if groups else None
        if last is not None and "norm" in type(last).__name__.lower():
            return f"its shortcut passes a {type(last).__name__} (post-norm)"
        return "it has no plain shortcut from input to output"


def unshared(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[str]:
    """Say what ties blocks to anything else, or steps into their calls."""
    own = {id(t) for block in blocks for t in (*block.parameters(), *block.buffers())}
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) in own:
                names.setdefault(id(tensor), []).append(f"{path}.{name}".lstrip("."))
    for shared in names.values():
        if len(shared) > 1:
            yield f"{shared[0]} is also {shared[1]}: its blocks are tied, or listed twice"
    for block in blocks:
        for path, module in block.named_modules():
            where = f"{path or 'a block'}, a {type(module).__name__},"
            if any(getattr(module, kind) for kind in HOOKS):
                yield f"{where} has hooks, which a new block would not have"
            if hasattr(module, "_orig_mod") or vars(module).get("_compiled_call_impl") is not None:
                yield f"{where} is compiled by itself"
            if torch.nn.utils.parametrize.is_parametrized(module):
                yield f"{where} is parametrized"
            if is_open(module):
                yield f"something grew at {where} which a new block would not have"


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
