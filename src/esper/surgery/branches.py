"""Branches that stay: kernels kept beside the user's layers become registered children of the host.

They hang under one thin module at the host's root, so ``parameters()``, ``to``, ``state_dict`` and
``deepcopy`` see them and no existing key changes. The site itself keeps a seam to its kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from esper.blueprints.kernel import LiveKernel
from esper.errors import SurgeryError
from esper.surgery.isolation.seam import close_seam, open_seam

CHILD = "grown"  # the name of the thin module under the host


class GrownBranches(nn.Module):
    """Holds the grown branches by name; in a Sequential, which would run it, it lets the input pass."""

    def forward(self, x: Any) -> Any:
        """Return the input."""
        return x


class Fossil:
    """A gateway that adds a kept kernel's output: ``y + k(x)``, or ``y + k(y)`` where it is serial."""

    def __init__(self, kernel: LiveKernel, port: Literal["parallel", "serial"]) -> None:
        self.kernel, self.serial = kernel, port == "serial"
        self.x: Tensor | None = None

    def enter(self, x: Tensor | None) -> None:
        """Keep the input until the next pass, so that a checkpointed exit can be recomputed."""
        self.x = None if self.serial else x

    def leave(self, y: Tensor) -> Tensor:
        """Return the sum."""
        x = y if self.serial else self.x
        return y if x is None else y + self.kernel(x).to(y.dtype)

    def part(self) -> Mapping[str, Tensor]:
        """Return nothing that the host's state has not."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the last input behind; it may hang on a graph."""
        return {**self.__dict__, "x": None}


def branches(host: nn.Module) -> GrownBranches | None:
    """Return the host's module of grown branches."""
    found = host._modules.get(CHILD)
    return found if isinstance(found, GrownBranches) else None


def attach(
    host: nn.Module,
    name: str,
    kernel: LiveKernel,
    ends: tuple[nn.Module, nn.Module],
    port: Literal["parallel", "serial"],
) -> None:
    """Register a kernel under the host and let its site add it from now on.

    Raises:
        SurgeryError: The host has something else of that name.
    """
    holder = branches(host)
    if holder is None:
        if hasattr(host, CHILD):
            raise SurgeryError(
                f"the model has an attribute {CHILD!r} of its own, the name grown branches are kept under; "
                "rename it to grow branches"
            )
        holder = GrownBranches()
        host.add_module(CHILD, holder)
    if name in holder._modules:
        raise SurgeryError(f"the model has a grown branch {name!r} already")
    holder.add_module(name, kernel)
    fossil = Fossil(kernel, port)
    open_seam(ends[0], "entry", fossil)
    open_seam(ends[1], "exit", fossil)


def detach(host: nn.Module, name: str, ends: tuple[nn.Module, nn.Module]) -> None:
    """Take a branch out again; without any left the host is exactly as before it grew branches."""
    holder = branches(host)
    if holder is None or name not in holder._modules:
        raise SurgeryError(f"the model has no grown branch {name!r}")
    kernel = holder._modules.pop(name)
    for module, role in zip(ends, ("entry", "exit"), strict=True):
        for own, gateway in module.__dict__["_esper_seam"][0]:
            if own == role and isinstance(gateway, Fossil) and gateway.kernel is kernel:
                close_seam(module, role, gateway)
    if not holder._modules:
        del host._modules[CHILD]
