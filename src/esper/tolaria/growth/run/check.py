"""Compare a place's output before and after growth became part of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from esper.errors import SurgeryError
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.widths.layers import coarsest
from esper.surgery.adding import Passing, passing_of
from esper.surgery.isolation.contexts import evaluating, slow_path, untouched
from esper.surgery.isolation.seam import look_through

ROUNDING = 24  # units of machine precision, times the largest output: 2e-6 · √2 in fp32


def output(model: MorphableModel, layer: nn.Module, run: Callable[[], object]) -> Tensor:
    """Return a layer's output on the probe batch, in eval mode; of several calls, that of the last.

    Raises:
        SurgeryError: The probe does not reach it.
    """
    return outputs(model, {"": layer}, run)[""][-1]


def outputs(
    model: MorphableModel, layers: Mapping[str, nn.Module], run: Callable[[], object]
) -> dict[str, list[Tensor]]:
    """Return several layers' outputs in one pass, those of every call.

    Raises:
        SurgeryError: The probe does not reach one of them.
    """
    captures = {name: Capture() for name in layers}
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(look_through(layer, "exit", captures[name]))
        with evaluating(model), untouched(model.host, seed=0), slow_path():
            run()
    found = {name: capture.outputs for name, capture in captures.items() if capture.outputs}
    if missed := layers.keys() - found.keys():
        raise SurgeryError(f"the probe did not reach the grown layer {', '.join(sorted(missed))}".rstrip())
    return found


def passing(
    model: MorphableModel, ends: tuple[nn.Module, nn.Module], run: Callable[[], object], serial: bool
) -> Passing:
    """Return where in calls the tensors are that a branch at a place reads and is added to.

    Raises:
        SurgeryError: The probe does not reach it, or no plain code could add to its output.
    """
    calls: list[tuple[tuple[object, ...], dict[str, object]]] = []
    made: list[object] = []
    entry, exit_ = ends

    def enter(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        calls.append((args, kwargs))

    def leave(module: nn.Module, args: tuple[object, ...], y: object) -> None:
        made.append(y)

    with ExitStack() as stack:
        stack.callback(entry.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(exit_.register_forward_hook(leave).remove)
        with evaluating(model), untouched(model.host, seed=0), slow_path():
            run()
    if not (calls and made):
        raise SurgeryError("the probe did not reach the layer that grows")
    return passing_of(*calls[-1], made[-1], serial)


def fineness(said: Mapping[str, Sequence[Tensor]]) -> float:
    """Return the step of the coarsest numbers that layers said something in: autocast is seen only here."""
    return max((torch.finfo(one.dtype).eps for each in said.values() for one in each), default=0.0)


def deviation(branch: Tensor, grown: Tensor, made: Iterable[nn.Module] = (), coarse: float = 0.0) -> float:
    """Return the largest difference between the branch as it was judged and what it became.

    Args:
        branch: What was said before.
        grown: What is said now.
        made: Modules that both were made with: where one of them computes in coarser numbers than the result
            is written in, those round it.
        coarse: Step of the numbers that both are known to have been computed with.

    Raises:
        SurgeryError: It is beyond rounding.
    """
    difference = float((branch - grown).abs().max())
    step = max(torch.finfo(grown.dtype).eps, coarse, coarsest(made))
    allowed = ROUNDING * step * float(branch.abs().max())
    if not difference <= max(allowed, torch.finfo(grown.dtype).tiny):
        raise SurgeryError(
            f"the grown layers differ from the branch by {difference:.3g}; {allowed:.3g} is rounding"
        )
    return difference


class Capture:
    """Keeps the outputs that pass a seam."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []

    def enter(self, x: Tensor | None) -> None:
        """Let inputs pass."""

    def leave(self, y: Tensor) -> Tensor:
        """Keep the output and let it pass."""
        self.outputs.append(y.detach())
        return y
