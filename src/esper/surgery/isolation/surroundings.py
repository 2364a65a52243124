"""What a call of the user's code has changed outside the model is put back, unless the call was their own.

A loss keeps a history, a hook counts: both show what the user's loop has done, and nothing of Esper's calls.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import CellType

from torch import nn

from esper.surgery.isolation.reach import is_data, reach_of
from esper.surgery.isolation.remembered import DEEP, Memory
from esper.surgery.isolation.restoring import MISSING, restored_class


class Postponed(threading.local):
    """What a thread is to do once everything was put back: it would be undone, too."""

    def __init__(self) -> None:
        self.depth = 0
        self.waiting: list[Callable[[], object]] = []


POSTPONED = Postponed()


def afterwards(act: Callable[[], object]) -> None:
    """Do something that is to last: at once, or behind what is put back."""
    if POSTPONED.depth:
        POSTPONED.waiting.append(act)
    else:
        act()


@contextmanager
def postponing() -> Iterator[None]:
    """Do what was postponed at the end of the outermost of these."""
    POSTPONED.depth += 1
    try:
        yield
    finally:
        POSTPONED.depth -= 1
        if not POSTPONED.depth:
            waiting = list(POSTPONED.waiting)
            POSTPONED.waiting.clear()
            with ExitStack() as stack:  # each of them, though one raises
                for act in reversed(waiting):
                    stack.callback(act)


KNOWN: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[Surroundings]]] = weakref.WeakKeyDictionary()


class Surroundings:
    """What one function of the user's reaches, put back after each of Esper's calls.

    Hooks write on the way back, when the function is over: passes over the model put it back, too.

    Args:
        function: A loss, say.
        model: The model it runs, whose modules are looked after elsewhere.

    Attributes:
        lost: What cannot be put back, in words.
    """

    def __init__(self, function: Callable[..., object], model: nn.Module) -> None:
        self.reach = reach = reach_of(function, model)
        self.inside = {id(module) for module in model.modules()}
        known = [one for one in KNOWN.get(model, ()) if one() is not None]
        KNOWN[model] = [*known, weakref.ref(self)]
        self.lost: dict[str, None] = {}
        self.empty = not (reach.cells or reach.names or reach.objects or reach.classes)

    @contextmanager
    def same(self) -> Iterator[None]:
        """Put everything back afterwards."""
        if self.empty:
            yield
            return
        with postponing(), self.put_back():
            yield

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Remember, and put back."""
        reach, memory = self.reach, Memory(self.inside)
        cells = [(cell, held_in(cell)) for cell in reach.cells]
        names = [(table, name, table.get(name, MISSING)) for table, some in reach.names for name in some]
        data = [(kind, {n: v for n, v in vars(kind).items() if is_data(n, v)}) for kind in reach.classes]
        memory.takes([value for _, value in cells], DEEP)
        memory.takes([value for *_, value in names], DEEP)
        memory.takes(reach.objects, DEEP)
        for kind, held in data:
            memory.undo.append(partial(restored_class, kind, held))
            memory.takes(list(held.values()), DEEP - 1)
        try:
            yield
        finally:
            memory.put_back()
            for cell, value in cells:
                if value is not MISSING and held_in(cell) is not value:
                    cell.cell_contents = value
            for table, name, value in names:
                if table.get(name, MISSING) is not value:
                    if value is MISSING:
                        del table[name]
                    else:
                        table[name] = value
            self.lost |= dict.fromkeys(memory.lost)


@contextmanager
def same_surroundings(model: nn.Module) -> Iterator[None]:
    """Put back what the functions reach that run a model, as far as they are known."""
    with ExitStack() as stack:
        for one in KNOWN.get(model, ()):
            if (known := one()) is not None:
                stack.enter_context(known.same())
        yield


def held_in(cell: CellType) -> object:
    """Return what a cell holds."""
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING
