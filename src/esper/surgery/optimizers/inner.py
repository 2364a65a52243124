"""Finds the optimizers that stand inside a wrapper: SAM, Lookahead or a library's own.

A wrapper may step its inner optimizer and never itself, and the inner one keeps the moments. So both are
watched, and both follow the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch.optim import Optimizer

from esper.surgery.optimizers.private_api import is_made


def with_inner(given: Mapping[str, Optimizer]) -> dict[str, Optimizer]:
    """Return optimizers by name, each behind those that stand inside it and train some of its parameters.

    A wrapper that only passes on what it is asked, and has never called its base class's constructor, is left
    out: it has neither steps to count nor state.
    """
    found: dict[str, Optimizer] = {}
    for name, optimizer in given.items():
        for path, one in unfolded(name, optimizer, set()):
            if is_made(one) and not any(one is other for other in found.values()):
                found[path] = one
    return found


def with_wrappers(given: Mapping[str, Optimizer]) -> dict[str, Optimizer]:
    """Return optimizers whose state follows the model: those of `with_inner`, and wrappers with a state.

    A wrapper that has never called its base class's constructor has no steps to count; a state of its own,
    slow weights say, has to follow all the same.
    """
    found = with_inner(given)
    for name, optimizer in given.items():
        for path, one in unfolded(name, optimizer, set()):
            own = vars(one).get("state")
            if (
                path not in found
                and own is not None
                and not any(own is other.state for other in found.values())
            ):
                found[path] = one
    return found


def unfolded(name: str, optimizer: Optimizer, seen: set[int]) -> Iterator[tuple[str, Optimizer]]:
    """Yield what stands inside an optimizer, innermost first, and itself."""
    seen.add(id(optimizer))
    own = parameters_of(optimizer)
    for attribute, inner in vars(optimizer).items():
        if isinstance(inner, Optimizer) and id(inner) not in seen and own & parameters_of(inner):
            yield from unfolded(f"{name}.{attribute}", inner, seen)
    yield name, optimizer


def parameters_of(optimizer: Optimizer) -> set[int]:
    """Return the identities of what an optimizer trains."""
    return {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
