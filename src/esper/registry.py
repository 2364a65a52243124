"""A name is a file in a folder, or an entry point of another package; a miss lists what exists."""

from __future__ import annotations

import pkgutil
import sys
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Generic, TypeVar

from esper.errors import MissingExtraError, RegistryError, nearest
from esper.printable import quoted

Found = TypeVar("Found")


@cache
def _registered(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """List what packages on a path register: read once, for a file of every package is opened (4 ms)."""
    return tuple(entry_points(group=group))


class Registry(Generic[Found]):
    """Finds the implementations of one thing.

    ``Registry("esper.tamiyo.bandits", group="esper.bandits")`` knows ``ucb`` because there is a file
    ``tamiyo/bandits/ucb.py``. The file exports one object, the only name in its ``__all__``. Other
    packages add names by entry points of ``group``. Nothing is imported before it is asked for.

    Args:
        package: Dotted path of the folder.
        group: Entry-point group in which other packages register.
    """

    def __init__(self, package: str, group: str) -> None:
        self.package = package
        self.group = group

    def names(self) -> list[str]:
        """List every name without importing one: the folder's files, then other packages' entry points."""
        own = self._files()
        return own + sorted({entry.name for entry in self._entries()} - set(own))

    def get(self, name: str) -> Found:
        """Import what ``name`` stands for.

        Raises:
            RegistryError: Nothing, or more than one thing, has this name, or it cannot be imported.
            MissingExtraError: It needs a package that is not installed.
        """
        entries = [entry for entry in self._entries() if entry.name == name]
        own = name in self._files()
        if own and not entries:
            return self._export(name)
        if len(entries) == 1 and not own:
            return self._load(entries[0])
        if own or entries:
            owners = [self.package] * own + [entry.value for entry in entries]
            raise RegistryError(f"{name!r} is claimed by {' and '.join(owners)}; uninstall or rename one")
        raise RegistryError(f"{self.package} has no {quoted(name)}; {nearest(name, self.names())}")

    def _files(self) -> list[str]:
        spec = find_spec(self.package)
        if spec is None or spec.submodule_search_locations is None:
            raise RegistryError(f"{self.package} is not a folder of modules")
        found = pkgutil.iter_modules(spec.submodule_search_locations)
        return sorted(module.name for module in found if not module.name.startswith("_"))

    def _entries(self) -> tuple[EntryPoint, ...]:
        return _registered(self.group, tuple(sys.path))

    def _export(self, name: str) -> Found:
        module = import_module(f"{self.package}.{name}")
        exports = getattr(module, "__all__", ())
        if len(exports) != 1:
            raise RegistryError(f"{module.__name__} must name one object in __all__, not {list(exports)}")
        return getattr(module, exports[0])

    def _load(self, entry: EntryPoint) -> Found:
        try:
            return entry.load()
        except MissingExtraError:
            raise
        except (ImportError, AttributeError) as error:
            raise RegistryError(f"{entry.name!r} ({entry.value}) cannot be imported: {error}") from error
