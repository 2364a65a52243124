"""Run the model without leaving a trace: random numbers, buffers, attributes and mode are as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from esper.surgery.isolation.attributes import lent_tables, modules_of, same_attributes
from esper.surgery.isolation.draws import own_draws
from esper.surgery.isolation.global_draws import alone, global_streams_restored
from esper.surgery.isolation.remembered import Memory
from esper.surgery.isolation.surroundings import same_surroundings

GENERATORS = (torch.Generator, np.random.Generator, random.Random)
COUNTED = 1  # of a sampler of the user's own: what it counts with, and lists of that
START = np.random.MT19937(0).state
SPARE: list[np.random.MT19937] = []


@contextmanager
def same_randomness(seed: int | None = None) -> Iterator[None]:
    """Leave every random stream where it is; torch's numbers come from ``seed`` where one is given.

    Where other threads may draw meanwhile, torch's come from generators of this thread's own, and the streams
    of numpy and Python are not touched, see `global_draws.py`.
    """
    with global_streams_restored(), restored(seed) if alone() else own_draws(seed):
        yield


@contextmanager
def restored(seed: int | None) -> Iterator[None]:
    """Put every global random stream back afterwards.

    CUDA streams are touched only where CUDA is in use: reading one would initialise it.
    """
    python, cpu = random.getstate(), torch.get_rng_state()
    numpy_generator = np.random.get_bit_generator()  # exchanged, not copied: copying costs 70 µs a pass
    spare = SPARE.pop() if SPARE else np.random.MT19937()  # of the usual kind: a loss may look at it
    spare.state = START  # 30 µs, where making one takes 290
    np.random.set_bit_generator(spare)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        if seed is not None:  # torch.manual_seed would also format a stack trace for every backend (0.4 ms)
            torch.default_generator.manual_seed(seed)
            if cuda is not None:
                torch.cuda.manual_seed_all(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_bit_generator(numpy_generator)
        SPARE.append(spare)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def same_generators(loader: object) -> Iterator[None]:
    """Put the generators that a DataLoader and its samplers draw from back afterwards, and what these count.

    A loader of training batches may share them, and its order would change.
    """
    batches = getattr(loader, "batch_sampler", None)
    owners = loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)
    held = [one for owner in (*owners, getattr(loader, "dataset", None)) for one in held_by(owner)]
    found = {id(g): g for g in [getattr(owner, "generator", None) for owner in owners] + held}
    counted = Memory(set())
    for one in found.values():
        if isinstance(one, GENERATORS):
            counted.take(one)
    for owner in {id(one): one for one in owners}.values():
        counted.attributes(owner, COUNTED)
    try:
        yield
    finally:
        counted.put_back()


def held_by(owner: object) -> list[object]:
    """Return what an object holds in its attributes."""
    return list(getattr(owner, "__dict__", {}).values())


@contextmanager
def borrowed_buffers(model: nn.Module, gather: bool = False) -> Iterator[None]:
    """Let passes run on copies of the buffers, put back by reference.

    Copying back would bump tensor versions and break a backward pass that is still due; TorchScript's, which
    cannot be exchanged, are copied back all the same. Unless ``gather``, norms in training mode do not write
    their running statistics for the while: they normalise by the batch anyway, and vmap refuses to write
    them. They can still be read, but for those of an InstanceNorm.
    """
    kept: list[tuple[nn.Module, dict[str, Tensor | None]]] = []
    tracking: list[nn.Module] = []
    scripted: list[tuple[Tensor, Tensor]] = []
    for module in modules_of(model):
        if isinstance(module, torch.jit.ScriptModule):
            scripted += [(own, own.clone()) for own in module.buffers(recurse=False)]
        elif module._buffers:
            kept.append((module, module._buffers))
            silent = isinstance(module, _NormBase) and module.training and not gather
            without = silent and not isinstance(module, _BatchNorm)
            module._buffers = {
                k: None if without or v is None else v.clone() for k, v in module._buffers.items()
            }
            if silent and not without and module.track_running_stats:
                tracking.append(module)
                module.__dict__["track_running_stats"] = False
    try:
        yield
    finally:
        for module, buffers in kept:
            module._buffers = buffers
        for module in tracking:
            module.__dict__["track_running_stats"] = True
        put_back(scripted)


def put_back(changed: list[tuple[Tensor, Tensor]]) -> None:
    """Write tensors' earlier values where they have changed."""
    with torch.no_grad():
        for own, before in changed:
            if not torch.equal(own, before):
                own.copy_(before)


@contextmanager
def untouched(model: nn.Module, seed: int | None = None, gather: bool = False) -> Iterator[None]:
    """Run passes that leave random streams, buffers, plain attributes and what hooks write to as they were.

    Enter it inside :func:`evaluating`, or take :func:`examining` for both: which norms lose their statistics
    depends on the mode they are in.
    """
    with ExitStack() as stack:
        stack.enter_context(same_randomness(seed))
        stack.enter_context(same_surroundings(model))
        stack.enter_context(same_attributes(model))
        stack.enter_context(lent_tables(model))
        stack.enter_context(borrowed_buffers(model, gather))
        yield


@contextmanager
def slow_path() -> Iterator[None]:
    """Let ``nn.TransformerEncoder`` call its layers: in evaluation its fast path passes them by.

    The switch is torch's own and global; it is put back.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def same_modes(model: nn.Module) -> Iterator[None]:
    """Give every module its own mode back, whichever passes were run in."""
    modes = [(module, module.training) for module in modules_of(model)]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run passes in eval mode without gradients; every module gets its own mode back."""
    with same_modes(model), torch.no_grad():
        for module in modules_of(model):
            module.training = False
        yield


@contextmanager
def examining(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Run passes in eval mode, without gradients, that leave nothing as it was not."""
    with evaluating(model), untouched(model, seed):
        yield


@contextmanager
def taught() -> Iterator[None]:
    """Let growth take gradients and change weights wherever the loop calls it, under ``no_grad`` too."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
