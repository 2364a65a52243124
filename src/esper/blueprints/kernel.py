"""Kernels at work: modules that map what a site reads to what is added to its output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints.program import Form, Program


class LiveKernel(nn.Module):
    """What an awake seed adds; exactly zero at birth.

    Attributes:
        outgoing: Names of the parameters that start at zero; scaling them together scales the output.
        axes: Along which axis a tensor holds one slice per unit, for those that do; empty where units cannot
            be told apart.
    """

    outgoing: tuple[str, ...]
    axes: Mapping[str, int]


class GraphKernel(LiveKernel):
    """Runs a program; a compiled form can take the program's place at any time, over the same weights.

    Args:
        program: Program to run.
        like: Tensor whose device and dtype the weights get; None: the default ones.

    Attributes:
        form: The compiled form in use, None while it runs eagerly; not part of copies or saved states.
        pipeline: Name of what compiled it, "eager" without.
    """

    def __init__(self, program: Program, like: Tensor | None = None) -> None:
        super().__init__()
        self.outgoing: tuple[str, ...] = program.outgoing
        self.axes: Mapping[str, int] = {}
        self.program = program
        self.form: Form | None = None
        self.pipeline = "eager"
        for weight in program.weights:
            device, dtype = (None, None) if like is None else (like.device, like.dtype)
            self.register_parameter(weight.name, nn.Parameter(weight.draw(device, dtype)))

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the site's output, in its shape.

        What was tapped under autocast may be half as wide as the weights; outside it has to be widened first.
        """
        own: Mapping[str, Any] = self._parameters  # plain tensors while candidates run under functional_call
        weights = [own[weight.name] for weight in self.program.weights]
        if weights and x.dtype != weights[0].dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(weights[0].dtype)
        return (self.form or self.program.run)(x, weights)

    def swap(self, form: Form | None, pipeline: str) -> None:
        """Run a compiled form from now on, or the program again; weights and their identity stay."""
        self.form, self.pipeline = form, pipeline if form is not None else "eager"

    def __getstate__(self) -> dict[str, object]:
        """Leave the compiled form behind; a copy runs eagerly until it is given one."""
        return {**self.__dict__, "form": None, "pipeline": "eager"}


def initial_weights(program: Program, seed: int) -> dict[str, Tensor]:
    """Return the weights a seed starts a program with, on the CPU in float32; no global stream moves."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {weight.name: weight.draw("cpu", torch.float32) for weight in program.weights}
