"""What a user's function can write to besides what it is given: told from its code, once.

Closure cells, globals that its code names, default arguments, the object whose method it is; the same of the
functions of the user's own that it calls, and of what a model runs: its modules' forwards and hooks.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType

from torch import nn

DEEP = 3  # calls of the user's functions by one another that are followed
MOST = 200  # functions that are read
LIBRARIES = {*sys.stdlib_module_names, "esper", "torch", "numpy"} - {"__main__"}
CODE = (FunctionType, MethodType, partial)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


@dataclass
class Reach:
    """Places that can be written to.

    Attributes:
        cells: Of closures.
        names: Tables of names, of modules, with the names that are meant.
        objects: What is held by defaults, partials, methods and modules.
        classes: Classes of the user's, whose attributes may count.
    """

    cells: list[CellType] = field(default_factory=list)
    names: list[tuple[dict[str, object], tuple[str, ...]]] = field(default_factory=list)
    objects: list[object] = field(default_factory=list)
    classes: list[type] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    def follow(self, value: object, depth: int = DEEP) -> None:
        """Take in what a function, a callable object or a method reaches."""
        if isinstance(value, MethodType):
            self.objects.append(value.__self__)
            self.follow(value.__func__, depth)
            self.follow(value.__self__, depth)
        elif isinstance(value, partial):
            self.objects += [*value.args, value.keywords]
            for one in (value.func, *value.args, *value.keywords.values()):
                self.follow(one, depth)
        elif isinstance(value, FunctionType):
            if (
                id(value) not in self.seen
                and depth >= 0
                and len(self.seen) < MOST
                and is_own(value.__module__)
            ):
                self.seen.add(id(value))
                self.read(value, depth)
        elif not isinstance(value, type | ModuleType) and is_own(type(value).__module__):
            if callable(value):
                self.follow(type(value).__call__, depth)
            if isinstance(value, nn.Module):
                self.follow(type(value).forward, depth)

    def read(self, function: FunctionType, depth: int) -> None:
        """Read a function's code."""
        self.objects += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        self.cells += function.__closure__ or ()
        codes = list(codes_of(function.__code__))
        asked = {name for code in codes for name in code.co_names}
        found = [content for cell in function.__closure__ or () for content in contents(cell)]
        names: list[str] = []
        for name in dict.fromkeys(name for code in codes for name in globals_of(code)):
            value = function.__globals__.get(name)
            if isinstance(value, ModuleType):
                self.module(value, asked, depth)
            elif isinstance(value, type):
                self.class_of(value)
                self.methods(value, asked, depth)
            elif isinstance(value, FunctionType) or not callable(value) or is_own(type(value).__module__):
                found.append(value)
                names += [] if isinstance(value, FunctionType) else [name]
        if names:
            self.names.append((function.__globals__, tuple(names)))
        for value in found:
            self.follow(value, depth - 1)
            self.methods(type(value), asked, depth)

    def module(self, module: ModuleType, asked: set[str], depth: int) -> None:
        """Take in a module of the user's, as far as the code names what it holds."""
        if not is_own(module.__name__):
            return
        held = {name: value for name, value in vars(module).items() if name in asked}
        plain = [
            name for name, value in held.items() if not isinstance(value, type | ModuleType | FunctionType)
        ]
        self.names.append((vars(module), tuple(plain)))
        for value in held.values():
            self.class_of(value)
            self.follow(value, depth - 1)

    def methods(self, kind: type, asked: set[str], depth: int) -> None:
        """Take in the methods of a class of the user's that the code names."""
        if is_own(kind.__module__):
            for name in asked & {name for base in kind.__mro__ for name in vars(base)}:
                method = getattr(kind, name, None)
                self.follow(method.__func__ if isinstance(method, MethodType) else method, depth - 1)
            self.class_of(kind)

    def class_of(self, kind: object) -> None:
        """Take in a class of the user's that holds data."""
        if not isinstance(kind, type) or not is_own(kind.__module__) or kind in self.classes:
            return
        if any(is_data(name, value) for name, value in vars(kind).items()):
            self.classes.append(kind)


def reach_of(function: Callable[..., object], model: nn.Module) -> Reach:
    """Return what a loss and the model it runs can write to."""
    found = Reach()
    found.follow(function)
    if not isinstance(function, CODE):
        found.objects.append(function)
    for parameter in model.parameters():
        for table in TENSOR_HOOKS:
            for hook in list((getattr(parameter, table, None) or {}).values()):
                found.follow(hook)
    for module in model.modules():
        plain = [value for name, value in vars(module).items() if not name.startswith("_")]
        if is_own(type(module).__module__):
            found.follow(type(module).forward)
            found.class_of(type(module))
            found.objects += [one for one in plain if is_own(type(one).__module__) and has_state(one)]
        for one in plain:
            if isinstance(one, CODE):
                found.follow(one)
        for table in HOOKS:
            for hook in list(getattr(module, table, {}).values()):
                found.follow(hook)
    return found


def has_state(value: object) -> bool:
    """Tell an object that may change, and is no part of a model."""
    return not isinstance(value, nn.Module | type | ModuleType | FunctionType)


def is_own(module: str | None) -> bool:
    """Tell a module of the user's, or of a package, from those of Python, torch and Esper."""
    return module is None or module.partition(".")[0] not in LIBRARIES


def is_data(name: str, value: object) -> bool:
    """Tell an attribute of a class that is neither code nor Python's own."""
    return not name.startswith("__") and not callable(value) and not hasattr(value, "__get__")


def contents(cell: CellType) -> Iterator[object]:
    """Give what a cell holds, if anything yet."""
    try:
        yield cell.cell_contents
    except ValueError:
        return


def codes_of(code: CodeType) -> Iterator[CodeType]:
    """Give a code and those of the functions within it."""
    yield code
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield from codes_of(one)


def globals_of(code: CodeType) -> Iterator[str]:
    """Give the globals that a code names."""
    for step in dis.get_instructions(code):
        if step.opname.endswith("_GLOBAL") and isinstance(step.argval, str):
            yield step.argval
