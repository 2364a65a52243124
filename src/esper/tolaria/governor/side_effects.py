"""Does running a kernel change anything but the kernel: the host, what it reads, who listens, random streams?

A kernel is run once more on what it last read and everything around it is compared before and after. What a
fresh kernel of the same place does is its right: where the host's own dropout stands between two layers it
draws a mask, and has to leave the random streams as the fresh one does.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from esper.surgery.isolation.contexts import same_randomness
from esper.tolaria.governor.private_api import listening, require, version_of
from esper.tolaria.governor.vitals import part

SEED = 0  # of the random numbers an audit draws
NODES = 512  # of a kernel's graph that are walked; the largest blueprint has some 60
Streams: TypeAlias = tuple[str, bytes]  # states of numpy's and torch's random streams


@dataclass(frozen=True)
class AllowedEffects:
    """What a fresh kernel of a place does with an input of this shape."""

    shape: torch.Size
    streams: Streams  # begun at SEED, behind a pass
    reaches: frozenset[int]  # tensors of the host that its graph ends at


class HostFingerprint:
    """What a host was before something ran.

    Args:
        host: Module whose weights and buffers are watched: writes to all, the bits of those whose turn it is.
        share: Part of every large tensor that is digested, 0 to 1, see ``Reading``.
        turn: Number of the part, from 0; parts move through a tensor.
    """

    def __init__(self, host: nn.Module, share: float = 1.0, turn: int = 0) -> None:
        require()
        self.host, self.share, self.turn = host, share, turn
        self.tensors = [t.detach() for t in (*host.parameters(), *host.buffers()) if t.numel()]
        self.versions, self.digests = self.writes(), self.bits()
        self.listeners = [(owner, name, set(table)) for owner, name, table in listening(host)]

    def writes(self) -> list[int]:
        """Count the writes to each tensor."""
        return [version_of(tensor) for tensor in self.tensors]

    def bits(self) -> list[Tensor]:
        """Digest the parts whose turn it is; not waited for on a device."""
        parts = self.tensors if self.share >= 1 else [part(t, self.share, self.turn) for t in self.tensors]
        return [torch.hash_tensor(one) for one in parts if not one.is_complex()]

    def broken(self) -> str | None:
        """Say what has changed, or None."""
        if self.writes() != self.versions or any(map(differ, self.bits(), self.digests)):
            return "it writes to the host's weights or buffers"
        if any(self.added()):
            return "it hooks into the host"
        return None

    def added(self) -> Iterator[tuple[MutableMapping[int, object], int]]:
        """List who has begun to listen since: a table and a key in it."""
        for owner, name, keys in self.listeners:
            table = getattr(owner, name) or {}
            yield from ((table, key) for key in list(table) if key not in keys)

    def unhook(self) -> None:
        """Take them away."""
        for table, key in list(self.added()):
            del table[key]


def differ(one: Tensor, other: Tensor) -> bool:
    """Tell whether two digests differ."""
    return not torch.equal(one, other)


def streams() -> Streams:
    """Return the state of numpy's and torch's streams: 15 µs while numpy's is exchanged, see isolation."""
    generator = np.random.get_bit_generator()
    return str(generator.state), torch.get_rng_state().numpy().tobytes()


def leaves(y: Tensor, own: Collection[int]) -> Iterator[int]:
    """Walk a graph back to the tensors it ends at, those in ``own`` left out."""
    seen, waiting = set(), [y.grad_fn]
    while waiting and len(seen) < NODES:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in own:
            yield id(variable)
        waiting += [following for following, _ in node.next_functions]


def rights(run: Callable[[Tensor], Tensor], x: Tensor, own: Iterable[Tensor]) -> AllowedEffects:
    """See what a kernel that can be trusted does."""
    with same_randomness(SEED), torch.enable_grad():
        y = run(x.detach())
        return AllowedEffects(x.shape, streams(), frozenset(leaves(y, {id(t) for t in own})))


def find_side_effects(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    own: Iterable[Tensor],
    allowed: AllowedEffects,
    seal: HostFingerprint,
) -> tuple[str, bool]:
    """Run a kernel and say what it does that it may not, "" where all is well.

    Args:
        run: Kernel, from what it reads to its part of the output.
        x: Tensor the kernel last read, batch first; not written to unless the kernel does.
        own: Parameters of the kernel.
        allowed: Effects a fresh kernel of its place has.
        seal: Fingerprint of the host, just made.

    Returns:
        The reason, and whether the kernel gave nothing but zeros.
    """
    read, version = torch.hash_tensor(x), version_of(x)
    with same_randomness(SEED), torch.enable_grad():
        python = random.getstate()
        y = run(x.detach())
        drawn = streams() != allowed.streams or random.getstate() != python
    silent = not bool(y.detach().any())
    if version_of(x) != version or differ(torch.hash_tensor(x), read):
        return "it writes over what it reads", silent
    if (why := seal.broken()) is not None:
        return why, silent
    if drawn:
        return "it draws from the run's random streams", silent
    if any(leaf not in allowed.reaches for leaf in leaves(y, {id(t) for t in own})):
        return "gradients flow through it into the host", silent
    return "", silent
