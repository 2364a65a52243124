"""Which of several right forms is the fastest here? Measured side by side, within a budget of time."""

from __future__ import annotations

import math
import statistics
import time as clock
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from esper.blueprints.program import Form

MARGIN = 1.05  # times eager's speed, surely; a call varies by ±10 % on a shared machine
REFERENCE = "eager"
LEAST, MOST = 5, 200  # rounds; each runs every form once
CALLS_ON_DEVICE = 10  # calls per synchronisation where the device works asynchronously


@dataclass(frozen=True, slots=True)
class Figures:
    """One form's cost, on this device at one size."""

    milliseconds: float  # median of forward and backward
    speedup: float  # over eager, median of the rounds' ratios
    surely: float  # lower end of that median's 95 % interval
    memory: (
        int | None
    )  # peak bytes of forward and backward beyond what was held; None on CPU: not counted there
    rounds: int
    tags: tuple[str, ...] = ()  # "fast": the fastest, by the margin; "small": the least memory

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON values."""
        return {**asdict(self), "tags": list(self.tags)}


def characterise(
    forms: Mapping[str, Form], weights: Sequence[Tensor], example: Tensor, budget_seconds: float
) -> dict[str, Figures]:
    """Measure forms in turns, so that whatever else the machine does hits all alike.

    Args:
        forms: Verified forms by pipeline, eager among them; the first is no better placed than the last.
        weights: Tensors in the program's order.
        example: Input of the runs, batch first.
        budget_seconds: Seconds after which no round starts; at least five are run.
    """
    end = clock.perf_counter() + budget_seconds
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (example, *weights)]
    names = list(forms)
    for _ in range(2):  # the first calls compile, allocate and choose algorithms
        for name in names:
            _step(forms[name], leaves)
    memory = {name: _memory(forms[name], leaves) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    done = 0
    while done < LEAST or (done < MOST and clock.perf_counter() < end):
        turned = names[done % len(names) :] + names[: done % len(names)]
        for name in turned:
            # Not timed: the form before leaves its own code in the caches (eager against itself: 5 %).
            _step(forms[name], leaves)
            seconds[name].append(_seconds(forms[name], leaves))
        done += 1
    found: dict[str, Figures] = {}
    for name in names:
        ratios = sorted(a / b for a, b in zip(seconds[REFERENCE], seconds[name], strict=True))
        found[name] = Figures(
            milliseconds=statistics.median(seconds[name]) * 1e3,
            speedup=statistics.median(ratios),
            surely=ratios[lower_end(done)],
            memory=memory[name],
            rounds=done,
        )
    return _tagged(found)


def lower_end(count: int) -> int:
    """Return which of ``count`` sorted values is the lower end of their median's 95 % interval."""
    return max(0, int(count / 2 - 0.98 * math.sqrt(count)))


def fastest(figures: Mapping[str, Figures]) -> str:
    """Return the pipeline to keep: the one that is surely faster, by the margin and the most, or eager."""
    best = max(figures, key=lambda name: figures[name].surely)
    return best if figures[best].surely >= MARGIN else REFERENCE


def _tagged(figures: dict[str, Figures]) -> dict[str, Figures]:
    kept = fastest(figures)
    sizes = {name: one.memory for name, one in figures.items() if one.memory is not None}
    least = min(sizes.values(), default=None)
    tags = {
        name: ("fast",) * (name == kept != REFERENCE)
        + ("small",) * (name in sizes and sizes[name] == least != sizes[REFERENCE])
        for name in figures
    }
    return {name: replace(one, tags=tags[name]) for name, one in figures.items()}


def _step(form: Form, leaves: Sequence[Tensor]) -> None:
    output = form(leaves[0], leaves[1:])
    torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)


def _seconds(form: Form, leaves: Sequence[Tensor]) -> float:
    device = leaves[0].device
    if device.type != "cuda":
        # A thread's own CPU time is the wall's on a free core, and other processes leave it alone.
        now = clock.thread_time if torch.get_num_threads() == 1 else clock.perf_counter
        start = now()
        _step(form, leaves)
        return now() - start
    torch.cuda.synchronize(device)
    start = clock.perf_counter()
    for _ in range(CALLS_ON_DEVICE):
        _step(form, leaves)
    torch.cuda.synchronize(device)
    return (clock.perf_counter() - start) / CALLS_ON_DEVICE


def _memory(form: Form, leaves: Sequence[Tensor]) -> int | None:
    device = leaves[0].device
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    _step(form, leaves)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - held
