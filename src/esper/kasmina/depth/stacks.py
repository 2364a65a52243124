"""Stacks: like residual blocks in a row, where one more of their class can come without changing anything.

Found by running the model: every block is called once, in order, and hands its output to the next unchanged.
That a new block is the identity, and that the model takes it up, is tried on the spot before a stack counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from esper.contracts import Refusal, Site
from esper.errors import SurgeryError
from esper.kasmina.depth.birth import scales_of
from esper.kasmina.depth.deepen import duplicate, insert
from esper.kasmina.depth.identity import is_identity, unshared, zeros_of
from esper.kasmina.depth.stack import Stack
from esper.kasmina.recording.flops import FlopMeter
from esper.kasmina.recording.recorder import Refused
from esper.kasmina.recording.visits import PLAIN, RecordedCall, Visits, visit
from esper.printable import BLOCK
from esper.surgery.isolation.contexts import same_modes, untouched
from esper.surgery.isolation.seam import look_through


def find_stacks(
    model: nn.Module, run: Callable[[], object], examples: int = 1
) -> tuple[list[Stack], list[Refusal]]:
    """Return the stacks of a model, and every other row of like blocks with the reason.

    Args:
        model: The host; modes and everything else are put back.
        run: Function that calls the model once.
        examples: Examples in that run.
    """
    rows = innermost(list(rows_of(model)))
    blocks = [[model.get_submodule(f"{c}.{n}".lstrip(".")) for n in names] for c, names in rows]
    found: list[Stack] = []
    refusals: list[Refusal] = []
    with same_modes(model):
        seen: list[list[Visits]] = []
        for mode in (True, False):
            model.train(mode)
            with untouched(model, seed=0, gather=True):
                seen.append(visit(blocks, run))
        for row, members, train, evaluation in zip(rows, blocks, *seen, strict=True):
            several = sum(container == row[0] for container, _ in rows) > 1
            try:
                found.append(proven(model, run, row, several, members, (train, evaluation), examples))
            except (Refused, SurgeryError) as refusal:
                refusals.append(Refusal(titled(row[0], row[1], several), str(refusal)))
    return found, refusals


def rows_of(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """List rows of consecutive blocks of one class and the same shapes, by container."""
    for path, container in model.named_modules():
        if not isinstance(container, nn.Sequential | nn.ModuleList):
            continue
        row: list[str] = []
        kind: object = None
        for name, child in container.named_children():
            own = likeness(child)
            if own != kind and row:
                yield path, row
                row = []
            kind = own
            if own is not None:
                row.append(name)
        if row:
            yield path, row


def innermost(rows: Sequence[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """Leave out a block alone in its container that holds a row itself: a whole encoder is no layer."""
    containers = [path for path, _ in rows]
    kept: list[tuple[str, list[str]]] = []
    for path, names in rows:
        block = f"{path}.{names[0]}".lstrip(".")
        if len(names) > 1 or not any(one == block or one.startswith(f"{block}.") for one in containers):
            kept.append((path, names))
    return kept


def likeness(child: nn.Module) -> object:
    """Return what like blocks have in common; None for what is no block."""
    plain = type(child).__module__.startswith("torch.nn.modules") and not child._modules
    if (
        plain
        or isinstance(child, nn.ModuleList | nn.ModuleDict | torch.jit.ScriptModule)
        or type(child) is nn.Sequential
    ):
        return None
    if next(child.parameters(), None) is None:
        return None
    shapes = tuple((name, tuple(p.shape)) for name, p in (*child.named_parameters(), *child.named_buffers()))
    return type(child), shapes


def titled(container: str, names: Sequence[str], several: bool) -> str:
    """Name a place: after its container, or after its first block where the container holds several rows."""
    whole = container if container and not several else f"{container}.{names[0]}".lstrip(".")
    return f"{whole}{BLOCK}"


def proven(
    model: nn.Module,
    run: Callable[[], object],
    row: tuple[str, list[str]],
    several: bool,
    blocks: Sequence[nn.Module],
    seen: tuple[Visits, Visits],
    examples: int,
) -> Stack:
    """Make a stack of a row of blocks, and try one more block in it.

    Raises:
        Refused: The row is no stack, or the model does not take another block.
    """
    container, names = row
    for visits, mode in zip(seen, ("training", "evaluation"), strict=True):
        if reason := visits.refusal(len(blocks)):
            raise Refused(f"in {mode} {reason}")
    if reason := next(unshared(model, blocks), None):
        raise Refused(reason)
    if not any(parameter.requires_grad for parameter in blocks[-1].parameters()):
        raise Refused("its blocks are frozen, and so would be another")
    last = f"{container}.{names[-1]}".lstrip(".")
    given, y = seen[1].given, seen[1].y
    assert given is not None and y is not None
    trial = duplicate(model, last)
    zeroed = zeros_of(trial, given, y)
    if frozen := [name for name in zeroed if not blocks[-1].get_parameter(name).requires_grad]:
        raise Refused(f"{frozen[0]} is frozen: at zero it would stay there, and the block the identity")
    with torch.no_grad(), untouched(trial, seed=0), FlopMeter() as meter:
        given.call(trial.train(), y.clone())  # evaluation may take a fused path of which no formula is known
    site = Site(
        name=titled(container, names, several),
        kind="stack",
        entry=last,
        exit=last,
        between=(),
        width=len(names),
        granularity=1,
        unit_parameters=sum(parameter.numel() for parameter in blocks[-1].parameters()),
        unit_flops=meter.total // max(examples, 1),
        blueprint="deepen",
    )
    foreign = frozenset(model.get_submodule(container)._modules) - set(names)
    light = lightened(given, blocks[-1], y)
    stack = Stack(site, model, container, foreign, names[0], zeroed, scales_of(blocks[-1]), light)
    if not is_identity(stack.block(0), light, y):
        raise Refused("a fresh block does not return its input exactly")
    tried(stack, run)
    return stack


def lightened(given: RecordedCall, block: nn.Module, y: Tensor) -> RecordedCall:
    """Leave out what a block is given and does not need, a cache of other layers say."""
    with torch.no_grad(), untouched(block, seed=0):
        wanted = given.call(block, y.clone())
        for index, leaf in enumerate(given.leaves):
            if isinstance(leaf, PLAIN):
                continue
            less = given.without(index)
            try:
                same = torch.equal(less.call(block, y.clone()), wanted)
            except (RuntimeError, TypeError, AttributeError):  # it does need it
                continue
            given = less if same else given
    return given


class Witness:
    """A gateway at the new block: whether it was called, and returned what it was given."""

    def __init__(self) -> None:
        self.calls, self.exact = 0, True
        self.x: Tensor | None = None

    def enter(self, x: Tensor | None) -> None:
        """Keep the input."""
        self.calls += 1
        self.x = None if x is None else x.detach().clone()

    def leave(self, y: Tensor) -> Tensor:
        """Compare."""
        self.exact = self.exact and self.x is not None and torch.equal(self.x, y.detach())
        return y


def tried(stack: Stack, run: Callable[[], object]) -> None:
    """Insert a block for two passes: it must be called once, and nothing the model returns may change.

    Raises:
        Refused: Says what went wrong.
    """
    model, plan = stack.host, stack.deepening()
    before = outputs(model, run)
    block, witness = stack.block(0), Witness()
    try:
        inserted = insert(model, plan, block)
    except SurgeryError as error:
        raise Refused(str(error)) from None
    closers = [look_through(block, "entry", witness), look_through(block, "exit", witness)]
    try:
        after = outputs(model, run)
        model.train()
        with torch.no_grad(), untouched(model, seed=0, gather=True):
            run()
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise Refused(f"the model does not run with one more block: {error}") from None
    finally:
        for close in closers:
            close()
        inserted.undo()
    if witness.calls != 2:
        raise Refused(
            f"the model calls another block {witness.calls // 2} times: it counts its blocks itself"
        )
    if not witness.exact:
        raise Refused("another block does not return its input exactly")
    if len(before) != len(after) or not all(map(torch.equal, before, after)):
        raise Refused("another block changes what the model returns")


def outputs(model: nn.Module, run: Callable[[], object]) -> list[Tensor]:
    """List every tensor the run and the model return, in evaluation."""
    trees: list[object] = []

    def keep(module: nn.Module, args: object, result: object) -> None:
        trees.append(result)

    model.eval()
    hook = model.register_forward_hook(keep)
    try:
        with torch.no_grad(), untouched(model, seed=0):
            trees.append(run())
    finally:
        hook.remove()
    return [leaf for leaf in tree_flatten(trees)[0] if isinstance(leaf, Tensor)]
