"""What a user's function can write to besides what it is given: told from its code, once.

Closure cells, globals that its code names, default arguments, the object whose method it is; the same of the
functions of the user's own that it calls, and of what a model runs: its modules' forwards and hooks.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
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
        """Take in what a function, a callable object or a method reaches.

        By their types: what an object says of its class is code of the user's, which may raise.
        """
        kind = type(value)
        if type(value) is MethodType:
            self.objects.append(value.__self__)
            self.follow(value.__func__, depth)
            self.follow(value.__self__, depth)
            self.behind(value.__func__, value.__self__, depth)
        elif issubclass(kind, partial):
            assert isinstance(value, partial)
            self.objects += [*value.args, value.keywords]
            for one in (value.func, *value.args, *value.keywords.values()):
                self.follow(one, depth)
        elif type(value) is FunctionType:
            if (
                id(value) not in self.seen
                and depth >= 0
                and len(self.seen) < MOST
                and is_own(value.__module__)
            ):
                self.seen.add(id(value))
                self.read(value, depth)
        elif not issubclass(kind, type | ModuleType) and is_own(kind.__module__):
            for name in {"__call__", "forward"} & names_of(kind):
                function = unbound(kind, name)
                self.follow(function, depth)
                self.behind(function, value, depth)

    def behind(self, function: object, owner: object, depth: int) -> None:
        """Take in the class that a method is of, and the other methods of it that the method names."""
        kind = owner if isinstance(owner, type) else type(owner)
        if isinstance(function, FunctionType) and is_own(kind.__module__):
            asked = {name for code in codes_of(function.__code__) for name in code.co_names}
            self.methods(kind, asked, depth)

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
            kind = type(value)
            if issubclass(kind, ModuleType):
                assert isinstance(value, ModuleType)
                self.module(value, asked, depth)
            elif issubclass(kind, type):
                assert isinstance(value, type)
                self.class_of(value)
                self.methods(value, asked, depth)
            elif kind is FunctionType or not callable(value) or is_own(kind.__module__):
                found.append(value)
                names += [] if kind is FunctionType else [name]
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
            name
            for name, value in held.items()
            if not issubclass(type(value), type | ModuleType | FunctionType)
        ]
        self.names.append((vars(module), tuple(plain)))
        for value in held.values():
            self.class_of(value)
            self.follow(value, depth - 1)

    def methods(self, kind: type, asked: set[str], depth: int) -> None:
        """Take in the methods of a class of the user's that code names, and those that these name."""
        if depth < 0 or not is_own(kind.__module__):
            return
        self.class_of(kind)
        for name in asked & names_of(kind):
            method = unbound(kind, name)
            if id(method) not in self.seen:
                self.follow(method, depth - 1)
                self.behind(method, kind, depth - 1)

    def class_of(self, kind: object) -> None:
        """Take in a class of the user's that holds data."""
        if not issubclass(type(kind), type):
            return
        assert isinstance(kind, type)
        if not is_own(kind.__module__) or any(kind is one for one in self.classes):
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
            found.behind(type(module).forward, module, DEEP)
            found.class_of(type(module))
            found.objects += [one for one in plain if is_own(type(one).__module__) and has_state(one)]
        for one in plain:
            if issubclass(type(one), CODE):
                found.follow(one)
        for table in HOOKS:
            for hook in list(getattr(module, table, {}).values()):
                found.follow(hook)
    return found


def has_state(value: object) -> bool:
    """Tell an object that may change, and is no part of a model."""
    return not issubclass(type(value), nn.Module | type | ModuleType | FunctionType)


def is_own(module: object) -> bool:
    """Tell the name of a module of the user's, or of a package, from those of Python, torch and Esper."""
    return not isinstance(module, str) or module.partition(".")[0] not in LIBRARIES


def is_data(name: str, value: object) -> bool:
    """Tell an attribute of a class that is neither code nor Python's own."""
    return not name.startswith("__") and not callable(value) and not hasattr(type(value), "__get__")


def names_of(kind: type) -> set[str]:
    """List what a class and those it comes from define."""
    return {name for base in kind.__mro__ for name in vars(base)}


def unbound(kind: type, name: str) -> object:
    """Return a method as a class has it; nothing of the user's runs, as a property of a class would."""
    found = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
    if type(found) is staticmethod or type(found) is classmethod:
        return found.__func__
    if type(found) is property:
        return found.fget
    return found.func if type(found) is cached_property else found


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
