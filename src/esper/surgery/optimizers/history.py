"""Lets optimizers with one history for all parameters start anew when what they train changes."""

from __future__ import annotations

from collections.abc import Callable

from torch.optim import Optimizer

from esper.surgery.optimizers.kinds import kind_of
from esper.surgery.optimizers.private_api import forget_count


def forget(optimizer: Optimizer) -> Callable[[], None]:
    """Clear the history of an optimizer that has one for all parameters at once; returns the way back.

    The count of evaluations stays. The count of iterations becomes 0: by it LBFGS tells its first step.
    """
    if not kind_of(optimizer).history:
        return lambda: None
    before: list[tuple[dict[str, object], dict[str, object]]] = []
    for state in optimizer.state.values():
        before.append((state, dict(state)))
        kept = {"func_evals": state["func_evals"], "n_iter": 0} if "func_evals" in state else {}
        state.clear()
        state.update(kept)
    forget_count(optimizer)

    def undo() -> None:
        for state, old in before:
            state.clear()
            state.update(old)
        forget_count(optimizer)

    return undo


def remembers(optimizer: Optimizer) -> bool:
    """Tell whether an optimizer has a history that growth would clear."""
    return kind_of(optimizer).history and any("old_dirs" in state for state in optimizer.state.values())


def cleared(name: str, optimizer: Optimizer) -> str:
    """Say that a history was cleared."""
    kind = type(optimizer).__name__
    return f"{kind} {name!r}: its history spans all parameters at once; it starts anew with the grown ones"
