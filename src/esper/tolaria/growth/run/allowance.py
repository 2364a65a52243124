"""What growing may still cost, where ``budget.growth_flops`` says it: asked before anything is spent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from esper.kasmina.evidence.growth_cost import GrowthCost
from esper.kasmina.widths.places import Place
from esper.tolaria.growth.run.state import RunState

CHECKS = 4  # passes over a probe batch that prove an insertion and count its cost
JUDGEMENTS = 3  # of one event: when the next is due, when its time is up, and once more
DEAR = "budget.growth_flops"


class Priced(Protocol):
    """What says the price of a look before it is taken."""

    def price(self, places: Mapping[str, Place], units: Mapping[str, int]) -> tuple[int, int]:
        """Return its FLOPs at most, and how many held-out examples it reads."""


class Allowance:
    """Says what fits the budget of one run.

    Args:
        run: What the run knows of itself.
    """

    def __init__(self, run: RunState) -> None:
        self.run = run

    @property
    def left(self) -> float | None:
        """FLOPs that growing may still cost this process; None: any number."""
        most, cost = self.run.parts.budget.growth_flops, self.run.cost
        return None if most is None else max(most - cost.growth_flops, 0.0) / cost.processes

    def declined(self, price: int) -> str:
        """Say why what costs so much is not done; empty where it fits."""
        left = self.left
        if left is None or price <= left:
            return ""
        return f"the budget is spent: {DEAR} leaves {left:,.0f} FLOPs, and this could cost {price:,}"

    def judged(self, examples: int, early: bool) -> str:
        """Say why a judgement is not made; one that comes early leaves enough for that when time is up."""
        return self.declined((1 + early) * self.run.morphable.flops * examples)

    def dear(self, evidence: Priced, places: Mapping[str, Place], units: Mapping[str, int]) -> str:
        """Say why an event cannot be paid for; empty where it can, or where nobody counts."""
        if self.left is None or not units:
            return ""
        asked = {name: places[name] for name in units}
        look, held = evidence.price(asked, units)
        return self.declined(self.event(look, asked, units, held))

    def event(self, look: int, places: Mapping[str, Place], units: Mapping[str, int], held: int) -> int:
        """Return what an event costs at most: its look, what it inserts, and its judgements.

        Args:
            look: What the look costs.
            places: By name.
            units: By name.
            held: Held-out examples.
        """
        model = self.run.morphable
        grown = model.flops + GrowthCost(model.host, places)(units)[1]
        return look + grown * (CHECKS * model.examples + JUDGEMENTS * held)
