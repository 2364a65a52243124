"""What growth may spend: read, checked against the host it is for, and turned into limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from esper.config import Budget
from esper.errors import ConfigError, nearest
from esper.printable import QUOTE, quoted, shortened

# Counts, the multiple that says the same of any host, and what is counted.
COUNTS = {
    "parameters": ("growth_factor", "parameters"),
    "model_flops": ("flops_factor", "forward FLOPs per example"),
}


@dataclass(frozen=True, slots=True)
class Limits:
    """The most a grown model may be; None is unlimited."""

    parameters: int
    flops: int | None  # forward, per example
    latency_ms: float | None


def merged_budget(given: Mapping[str, object] | None, budget: Budget, parameters: int, flops: int) -> Budget:
    """Return the settings' budget with what the call overrides.

    Args:
        given: What the call overrides.
        budget: Of the settings.
        parameters: Of the host.
        flops: Of the host, forward, per example.

    Raises:
        ConfigError: No mapping, an unknown key, a value out of range, or a count below the host's own.
    """
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"budget={quoted(given)}; give a mapping, {{'growth_factor': 4.0}} for example")
    given = given or {}
    host = {"parameters": parameters, "model_flops": flops}
    for key in given:
        if key not in Budget.model_fields:
            said = key if isinstance(key, str) and len(key) <= QUOTE else quoted(key)
            raise ConfigError(f"unknown key 'budget.{said}'; {nearest(said, Budget.model_fields)}")
    for name, size in host.items():
        _refuse_fraction(name, given.get(name), size)
    facts: dict[str, Any] = {**budget.model_dump(), **given}
    try:
        merged = Budget(**facts)
    except ValueError as error:
        raise ConfigError(f"budget: {shortened(str(error), 500)}") from None
    for name, size in host.items():
        _refuse_small(name, getattr(merged, name), size)
    return merged


def limits(budget: Budget, parameters: int, flops: int) -> Limits:
    """Return the limits a budget sets a host; where a count is given, its multiple does not hold."""
    most = budget.parameters
    forward = budget.model_flops
    if most is None:
        most = int(budget.growth_factor * parameters)
    if forward is None and budget.flops_factor is not None:
        forward = int(budget.flops_factor * flops)
    return Limits(most, forward, budget.latency_ms)


def _refuse_fraction(name: str, value: object, size: int) -> None:
    """Refuse a count that is none: a multiple was meant, most likely."""
    if isinstance(value, float) and not value.is_integer():
        factor, what = COUNTS[name]
        raise ConfigError(
            f"budget: {name}={value} is a count, and no whole number; the model has {size:,} {what}: "
            f"use {factor}={value} for {value} times as many"
        )


def _refuse_small(name: str, value: int | None, size: int) -> None:
    """Refuse a count that leaves no model: a multiple was meant, most likely."""
    if value is not None and value < size:
        factor, what = COUNTS[name]
        raise ConfigError(
            f"budget: {name}={value} is a count, and the model has {size:,} {what} already; "
            f"use {factor}= for a multiple of the model's, such as {factor}=4"
        )
