"""Where and what: arms are site × width × start, ranked by improvement per budget share, then experience."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from esper.contracts import HealthReport, Site
from esper.tamiyo.bandits import Bandit
from esper.tamiyo.features import Moment, described, started

STARTS = {
    "mixed": 1.0,
    "svd": 0.9,
    "random": 0.5,
}  # prior worth; gradient directions won 7 of 8 races by hand
ALIKE = {"random": 1.0}  # a blueprint's hidden units cannot be drawn from a survey
OFF_SHARE = 0.85  # prior worth of a width other than the even share


@dataclass(frozen=True, slots=True)
class Arm:
    """One thing that could be done."""

    site: str
    share: float  # of the even share per event
    width: int  # units
    start: str
    score: float  # first-order improvement per share of the budget
    features: tuple[float, ...]  # what is known of it now; its prior first (features.py)

    @property
    def prior(self) -> float:
        """The reward that is expected of it before any experience, in [0, 1]."""
        return self.features[0]

    @property
    def name(self) -> tuple[str, float, str]:
        """Identify the arm across decisions; widths shrink and grow with the budget, shares stay."""
        return self.site, self.share, self.start


class SelectorState(TypedDict):
    """What was learned, as JSON values."""

    bandit: Mapping[str, object]
    tried: dict[str, int]
    kept: dict[str, int]


class SeedSelector:
    """Chooses among the arms with a bandit.

    Args:
        bandit: Bandit that learns which arms pay.
        shares: Widths to try, as multiples of the even share.
    """

    def __init__(self, bandit: Bandit, shares: Sequence[float]) -> None:
        self.bandit, self.shares = bandit, shares
        self.tried: dict[str, int] = {}  # decisions per site
        self.kept: dict[str, int] = {}

    def arms(
        self,
        sites: Sequence[Site],
        reports: Mapping[str, HealthReport],
        costs: Mapping[str, float],
        units: Mapping[str, float],
        room: Mapping[str, int],
        moment: Moment,
    ) -> list[Arm]:
        """List what may be chosen.

        Args:
            sites: Places free to grow.
            reports: Measurements there, by site; one without an improvement cannot be chosen.
            costs: Share of the remaining budget that one unit takes, per site.
            units: Even share per site, in units.
            room: Most units the budget allows, per site.
            moment: Facts about the run that every arm shares.
        """
        scores = {}
        for site in sites:
            improvement = reports[site.name].improvement if site.name in reports else None
            measured = improvement is not None and math.isfinite(improvement)
            if measured and room[site.name] >= site.granularity:
                scores[site.name] = improvement / costs[site.name] * self.experience(site.name)
        best = max(scores.values(), default=0.0)
        made: dict[tuple[str, int, str], Arm] = {}
        known = described(sites, reports, moment)
        for site in sites:
            if site.name not in scores or best <= 0:
                continue
            for share in sorted(self.shares, key=lambda s: abs(s - 1.0)):
                width = fitted(share * units[site.name], site.granularity, room[site.name])
                for start, worth in (STARTS if site.kind == "pair" else ALIKE).items():
                    prior = scores[site.name] / best * worth * (1.0 if share == 1.0 else OFF_SHARE)
                    features = (prior, *known[site.name], math.log2(share), *started(start))
                    made.setdefault(
                        (site.name, width, start),
                        Arm(site.name, share, width, start, scores[site.name], features),
                    )
        return list(made.values())

    def experience(self, site: str) -> float:
        """Return the share of a site's decisions that were kept, with one success for a start."""
        return (1 + self.kept.get(site, 0)) / (1 + self.tried.get(site, 0))

    def learn(self, arm: Arm, kept: bool, reward: float) -> None:
        """Take in what an arm brought."""
        self.tried[arm.site] = self.tried.get(arm.site, 0) + 1
        self.kept[arm.site] = self.kept.get(arm.site, 0) + kept
        self.bandit.learn(arm.name, np.array(arm.features), reward)

    def choose(self, arms: Sequence[Arm], rng: np.random.Generator) -> tuple[Arm, float]:
        """Return the chosen arm and its propensity."""
        index, propensity = self.bandit.choose(
            [arm.name for arm in arms], np.array([arm.features for arm in arms]), rng
        )
        return arms[index], propensity

    def state_dict(self) -> SelectorState:
        """Return what was learned."""
        return {"bandit": self.bandit.state_dict(), "tried": dict(self.tried), "kept": dict(self.kept)}

    def load_state_dict(self, state: SelectorState) -> None:
        """Take it back."""
        self.bandit.load_state_dict(state["bandit"])
        self.tried, self.kept = dict(state["tried"]), dict(state["kept"])


def fitted(units: float, granularity: int, room: int) -> int:
    """Round to whole groups, at least one, at most what there is room for."""
    groups = max(1, round(units / granularity))
    return min(groups, room // granularity) * granularity
