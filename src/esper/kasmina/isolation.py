"""Run the model without leaving a trace: random numbers, buffers and mode are as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase


@contextmanager
def same_randomness(seed: int | None = None) -> Iterator[None]:
    """Put every global random stream back afterwards; start torch's from ``seed`` where one is given.

    CUDA streams are touched only where CUDA is in use: reading one would initialise it.
    """
    python, cpu = random.getstate(), torch.get_rng_state()
    numpy_generator = np.random.get_bit_generator()  # exchanged, not copied: copying costs 70 µs a pass
    np.random.set_bit_generator(np.random.PCG64(seed or 0))
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
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextmanager
def same_generators(loader: object) -> Iterator[None]:
    """Put the generators that a DataLoader and its samplers draw from back afterwards.

    A loader of training batches may share them, and its order would change.
    """
    batches = getattr(loader, "batch_sampler", None)
    owners = loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)
    found = {id(g): g for g in (getattr(owner, "generator", None) for owner in owners) if g is not None}
    before = [(g, g.get_state()) for g in found.values() if isinstance(g, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in before:
            generator.set_state(state)


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
    for module in model.modules():
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
    """Run passes that leave random streams and buffers as they were.

    Enter it inside :func:`evaluating`, or take :func:`examining` for both: which norms lose their statistics
    depends on the mode they are in.
    """
    with same_randomness(seed), borrowed_buffers(model, gather):
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
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run passes in eval mode without gradients; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


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
