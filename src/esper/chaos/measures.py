"""What is measured follows from the marks and the weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from esper.chaos.fault import Seen


def seconds(seen: Seen) -> float | None:
    """Return the time from the fault to the next step that counts: after a restart, or a way back."""
    struck = seen.struck
    if struck is None:
        return None
    last = max(mark["attempt"] for mark in seen.marks)
    back = [mark["at"] for mark in seen.events("rolled_back") if mark["at"] >= struck["at"]]
    since = max([struck["at"], *back[:1]])
    steps = [mark["at"] for mark in seen.of("step") if mark["at"] > since and mark["attempt"] == last]
    return steps[0] - struck["at"] if steps else None


def lost(seen: Seen) -> int:
    """Count the steps that were done again by a later process, and those that the governor undid."""
    count = sum(int(mark["data"]["lost"]) for mark in seen.events("rolled_back"))
    for before, after in pairwise(seen.of("step")):
        if after["attempt"] > before["attempt"]:
            count += before["step"] - (after["step"] - 1)
    return count


def finite(weights: Mapping[str, Tensor]) -> bool:
    """Tell whether every number is."""
    return all(bool(torch.isfinite(t).all()) for t in weights.values() if t.is_floating_point())


def same(weights: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Tell whether two models are equal, bit for bit."""
    return weights.keys() == others.keys() and all(torch.equal(t, others[k]) for k, t in weights.items())
