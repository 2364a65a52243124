"""Trains to a stage of growth, and tries every handling there, in a child each; prints what came of it."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import esper
from esper.errors import EsperError
from tests.attacks.handling import X, handlings
from tests.cases.loops import Task, cross_entropy, narrow
from tests.cases.test_incubation_contained import Normed

STEPS, GOES_ON = 160, 8
HOSTS = {"pair": narrow, "branch": Normed}
STOPS = {  # optimizer steps, with these seeds; the stage is checked
    "incubate": {5: None, 20: "TRAINING", 31: "GRAFTING", 34: "STABILISING", 37: "EVALUATING", 42: None},
    "early": {2: None, 30: None, 120: None},
}


class Loop:
    """A plain loop that stops where it is told to."""

    def __init__(self, host: str, recipe: Any) -> None:
        torch.manual_seed(0)
        self.net: nn.Module = HOSTS[host]()
        self.draw = Task()
        self.optimizer = torch.optim.Adam(self.net.parameters(), 0.01)
        self.growth = esper.grow(
            self.net,
            self.optimizer,
            cross_entropy,
            probe=[self.draw(256)],
            steps=STEPS,
            growth=recipe,
            budget={"growth_factor": 8.0},
            config={"gate": {"false_keep": 0.5}, "early": {"false_keep": 0.4}},
        )

    def step(self, count: int = 1) -> None:
        """Train."""
        kind = next(self.net.parameters()).dtype
        for _ in range(count):
            x, y = self.draw()
            batch = x.to(kind), y
            loss = cross_entropy(self.net, batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.growth.step(batch, loss)

    def stage(self) -> str | None:
        """Name the stage of the seed that is awake."""
        trial = self.growth.run.orchestrator.oldest
        return None if trial is None else self.growth.run.morphable.layout.stage_of(trial.origin.seed).name

    def faults(self) -> list[str]:
        """List what is left of Esper, or was lost, once the run has ended."""
        found = []
        net, branch = self.net, hasattr(self.net, "grown")
        if any("_esper_seam" in vars(m) for m in net.modules()) and not branch:
            found.append("a seam is left")
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if held != {id(p) for p in net.parameters()}:
            found.append("the optimizer holds other parameters than the model")
        for parameter, state in self.optimizer.state.items():
            if state and state["exp_avg"].shape != parameter.shape:
                found.append("the optimizer's state has another shape")
        if self.optimizer._optimizer_step_post_hooks or self.optimizer._optimizer_step_pre_hooks:
            found.append("a hook is left in the optimizer")
        if not bool(torch.isfinite(net(X.to(next(net.parameters()).dtype))).all()):
            found.append("the output is not finite")
        return found


def ordinary(host: str, recipe: Any, name: str) -> str:
    """Return what a handling raises on a host that Esper never saw; '' where it works."""
    torch.manual_seed(0)
    net = HOSTS[host]()
    try:
        handlings(net)[name](net, type("Growth", (), {"report": dict, "state_dict": dict})())
    except Exception as error:
        return type(error).__name__
    return ""


def tried(loop: Loop, host: str, recipe: Any, name: str) -> str:
    """Handle the model, go on, and finish; returns what went wrong."""
    try:
        handlings(loop.net)[name](loop.net, loop.growth)
    except Exception as error:
        said = "StateError(", "torch.jit.script cannot hold"  # as dynamo wraps it; a branch's own
        own = isinstance(error, EsperError) or any(one in str(error) for one in said)
        if not own and ordinary(host, recipe, name) != type(error).__name__:
            return f"handling: {type(error).__name__}: {error}"[:300]
    try:
        loop.step(GOES_ON)
        loop.growth.finish()
    except Exception as error:
        return f"going on: {type(error).__name__}: {error}"[:300]
    return "; ".join(loop.faults())


def in_a_child(attempt: Callable[[], str]) -> str:
    """Try something in a process of its own, so that a crash is seen."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        faulthandler.enable()
        os.close(reader)
        os.write(writer, attempt().encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as told:
        said = told.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return said if code == 0 else f"the process ended with {code}"


def main(host: str, recipe: str, only: str = "") -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    loop, at, tries, faults = Loop(host, recipe), 0, 0, []
    for stop, stage in STOPS[recipe].items():
        loop.step(stop - at)
        at = stop
        assert loop.stage() == stage, (stop, loop.stage())
        for name in handlings(loop.net):
            if only in name:
                tries += 1
                if said := in_a_child(lambda name=name: tried(loop, host, recipe, name)):
                    faults.append([stop, stage, name, said])
    print(json.dumps({"tries": tries, "faults": faults}))


if __name__ == "__main__":
    main(*sys.argv[1:])
