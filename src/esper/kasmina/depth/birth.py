"""A new block of a class that is not ours to construct: a copy of a sibling, drawn anew.

Each module is drawn as its class does where it has ``reset_parameters``. Where the model was not left as
torch made it (GPT-like nets start at normal 0.02), the draw follows what the sibling had when the run began:
a tensor that was constant is that constant, and a matrix whose spread was not that of torch's own draw is
normal with the sibling's mean and spread.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from esper.kasmina.depth.deepen import duplicate
from esper.kasmina.recording.visits import RecordedCall
from esper.surgery.isolation.contexts import same_modes, same_randomness

ALIKE = 0.25  # relative difference of spreads up to which torch's own draw is kept


class Scale(NamedTuple):
    """How a tensor was spread when the run began; ``std`` is 0 exactly where it was constant."""

    mean: float
    std: float


def scales_of(block: nn.Module) -> dict[str, Scale]:
    """Measure every parameter of a block."""
    return {name: _scale(parameter.detach()) for name, parameter in block.named_parameters()}


def _scale(tensor: Tensor) -> Scale:
    flat = tensor.double().flatten()
    constant = len(flat) < 2 or bool((flat == flat[0]).all())
    return Scale(float(flat.mean()) if len(flat) else 0.0, 0.0 if constant else float(flat.std()))


def born(
    model: nn.Module, donor: str, scales: Mapping[str, Scale], zeroed: Sequence[str], seed: int
) -> nn.Module:
    """Return a fresh block; no global stream moves.

    Args:
        model: The host.
        donor: Path of the sibling.
        scales: Mean and standard deviation of each of the sibling's parameters when the run began, by name.
        zeroed: Parameters that start at zero.
        seed: Seed of the draw.
    """
    block = duplicate(model, donor)
    with same_randomness(seed), torch.no_grad():
        drawn = set(_reset(block))
        for name, parameter in block.named_parameters():
            _follow(parameter, scales[name], name in drawn)
        for name in zeroed:
            block.get_parameter(name).zero_()
    return block


def warmed(block: nn.Module, given: RecordedCall, x: Tensor) -> None:
    """Give norms that have seen nothing the statistics of one batch.

    Without them a new block evaluates by mean 0 and variance 1 until its running statistics have caught up,
    and what it has learned by then is judged by the wrong numbers.

    Args:
        block: Block that is in the model by now, still the identity.
        given: Arguments it is called with besides its input.
        x: Input of the block, (batch, …).
    """
    norms = [m for m in block.modules() if isinstance(m, _NormBase) and m.num_batches_tracked is not None]
    fresh = [(norm, norm.momentum) for norm in norms if not norm.num_batches_tracked]
    if not fresh:
        return
    try:
        for norm, _ in fresh:
            norm.momentum = 1.0
        with same_modes(block), torch.no_grad(), same_randomness(0):
            given.call(block.train(), x.clone())
    finally:
        for norm, momentum in fresh:
            norm.momentum = momentum


def _reset(block: nn.Module) -> Iterator[str]:
    """Draw every module that knows how, the innermost first; name the parameters it holds itself."""
    for path, module in reversed(list(block.named_modules())):
        own = "_reset_parameters" if isinstance(module, nn.MultiheadAttention) else "reset_parameters"
        reset = getattr(module, own, None)
        if not callable(reset) or any(
            given.default is inspect.Parameter.empty
            and given.kind not in (given.VAR_POSITIONAL, given.VAR_KEYWORD)
            for given in inspect.signature(reset).parameters.values()
        ):
            continue
        reset()
        yield from (f"{path}.{name}".lstrip(".") for name in module._parameters)


def _follow(parameter: Tensor, scale: Scale, drawn: bool) -> None:
    """Keep a module's own draw, or draw what the sibling's tensor was like."""
    if scale.std == 0:
        parameter.fill_(scale.mean)
    elif parameter.dim() < 2:
        if not drawn:
            parameter.fill_(scale.mean)
    else:
        chance = ALIKE + 3 / (2 * parameter.numel()) ** 0.5  # a small tensor's spread is uncertain itself
        if not drawn or abs(float(parameter.double().std()) / scale.std - 1) > chance:
            parameter.normal_(scale.mean, scale.std)
