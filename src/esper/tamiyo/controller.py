"""``Tamiyo``: health reports in, decisions out, outcomes back in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from esper.config import Config
from esper.contracts import ArmFacts, Decision, HealthReport, Outcome, Site
from esper.errors import ConfigError, nearest
from esper.printable import quoted
from esper.registry import Registry
from esper.tamiyo.bandits import Bandit
from esper.tamiyo.features import Moment
from esper.tamiyo.selector import Arm, SeedSelector, SelectorState
from esper.tamiyo.triggers import Trigger, TriggerState

BANDITS: Registry[Callable[..., Bandit]] = Registry("esper.tamiyo.bandits", "esper.bandits")


@dataclass(frozen=True, slots=True)
class RemainingBudget:
    """What the budget still allows; None is unlimited."""

    size: int  # parameters now
    parameters: float  # to come
    events: int
    model_flops: float | None


class TamiyoState(TypedDict):
    """What a run that goes on must know, as JSON values."""

    trigger: TriggerState
    selector: SelectorState
    pending: dict[str, list[Any]]  # an arm's fields in their order, by the decision's id
    refused: int
    decisions: int
    best_gain: float


class Tamiyo:
    """Decides when, where and what to grow.

    Args:
        config: Settings.
        steps: Number of optimizer steps of the run; None: not known.
        widenings: Number the budget has room for when each is as small as it may be.
    """

    def __init__(self, config: Config, steps: int | None, widenings: int) -> None:
        self.config = config
        self.trigger = Trigger(config.schedule, steps, min(config.budget.raced_events, widenings))
        self.selector = SeedSelector(made(config), config.widths.shares)
        self.pending: dict[int, Arm] = {}
        self.refused = 0  # gates in a row
        self.decisions = 0
        self.best_gain = 0.0

    def due(self, step: int, loss: float) -> str | None:
        """Return why a decision is due, or None."""
        reason = self.trigger.reason(step, loss)
        return None if self.refused >= self.config.schedule.patience else reason

    def decide(
        self,
        step: int,
        why: str,
        sites: Sequence[Site],
        reports: Mapping[str, HealthReport],
        room: RemainingBudget,
        rng: np.random.Generator,
        only: str | None = None,
    ) -> Decision:
        """Choose what to do.

        Args:
            step: Optimizer step now.
            why: Reason the decision is due.
            sites: Places free to grow.
            reports: Measurements there, by site.
            room: Rest of the budget.
            rng: The policy's own random stream.
            only: Name of a site the user asked for; None: any.
        """
        self.decisions += 1
        left = max(1, min(room.events, 1 + len(self.trigger.due)))
        asked = [site for site in sites if only in (None, site.name)]
        factor = (1 + max(room.parameters, 0) / room.size) ** (1 / left)  # the same every time
        spend = room.size * (factor - 1)
        units = {s.name: (spend - s.base_parameters) / s.unit_parameters for s in asked}
        most = {s.name: self.most(s, room) for s in asked}
        costs = {s.name: s.unit_parameters / max(room.parameters, 1) for s in asked}
        if room.model_flops is not None:
            costs = {s.name: costs[s.name] + s.unit_flops / max(room.model_flops, 1) for s in asked}
            most = {s.name: min(most[s.name], int(room.model_flops // s.unit_flops)) for s in asked}
        units = {name: max(value, self.config.widths.min_units) for name, value in units.items()}
        moment = Moment(
            room.events / max(room.events + self.decisions - 1, 1), float(self.trigger.standing())
        )
        arms = self.selector.arms(asked, reports, costs, units, most, moment) if room.events > 0 else []
        if not arms:
            reason = f"{why}; {why_none(room, most)}"
            return Decision(self.decisions, step, "nothing", None, 0, None, reason, 1.0, None)
        arm, propensity = self.selector.choose(arms, rng)
        self.pending[self.decisions] = arm
        listed = tuple(facts(arm) for arm in arms)
        among = len({a.site for a in arms})
        reason = f"{why}; {arm.site} promises most for its share of the budget among {among} sites"
        improvement, flops = reports[arm.site].improvement, {s.name: s.unit_flops for s in asked}
        predicted = None if improvement is None else improvement / flops[arm.site]
        return Decision(
            self.decisions,
            step,
            "widen" if next(s for s in asked if s.name == arm.site).kind == "pair" else "graft",
            arm.site,
            arm.width,
            arm.start,
            reason,
            propensity,
            predicted,
            listed,
        )

    def adopt(self, decision: Decision) -> None:
        """Take over a decision that was made elsewhere: by a process before this one, or by another rank.

        It stands in place of the one of its number; the outcome is learned for its arm.
        """
        self.pending.pop(decision.id, None)
        if decision.site is not None and decision.start is not None:
            what = decision.site, decision.width, decision.start
            alike = (a for a in decision.arms if (a["site"], a["width"], a.get("start")) == what)
            arm = next(alike, None) or ArmFacts(site=decision.site, width=decision.width, score=None)
            share, score, features = arm.get("share", 1.0), arm["score"] or 0.0, arm.get("features", (0.0,))
            self.pending[decision.id] = Arm(
                decision.site, share, decision.width, decision.start, score, tuple(features)
            )

    def most(self, site: Site, room: RemainingBudget) -> int:
        """Return the most units the parameter budget allows at a site."""
        units = int(max(room.parameters - site.base_parameters, 0) // site.unit_parameters)
        return units if site.most is None else min(units, site.most)

    def learn(self, outcome: Outcome, step: int) -> None:
        """Take in an outcome: its gain per parameter relative to the best seen; a failure is worth 0."""
        arm = self.pending.pop(outcome.decision, None)
        if arm is None:  # another process decided otherwise, and its word counts
            return
        reward = 0.0
        if outcome.kept and outcome.gain is not None and not outcome.parameters:
            reward = 1.0  # folded into a layer: a gain that costs nothing
        elif outcome.kept and outcome.gain is not None:
            rate = outcome.gain / outcome.parameters
            self.best_gain = max(self.best_gain, rate)
            reward = rate / self.best_gain if self.best_gain > 0 else 0.0
        self.refused = 0 if outcome.kept else self.refused + 1
        if not outcome.kept:
            self.trigger.again(step)
        self.selector.learn(arm, outcome.kept, max(reward, 0.0))

    def state_dict(self) -> TamiyoState:
        """Return everything learned and pending, as JSON values."""
        pending = {
            str(i): [a.site, a.share, a.width, a.start, a.score, list(a.features)]
            for i, a in self.pending.items()
        }
        return {
            "trigger": self.trigger.state_dict(),
            "selector": self.selector.state_dict(),
            "pending": pending,
            "refused": self.refused,
            "decisions": self.decisions,
            "best_gain": self.best_gain,
        }

    def load_state_dict(self, state: TamiyoState) -> None:
        """Go on deciding."""
        self.trigger.load_state_dict(state["trigger"])
        self.selector.load_state_dict(state["selector"])
        self.pending = {
            int(i): Arm(site, share, width, start, score, tuple(told if isinstance(told, list) else [told]))
            for i, (site, share, width, start, score, told) in state[
                "pending"
            ].items()  # once the prior alone
        }
        self.refused, self.decisions, self.best_gain = (
            state["refused"],
            state["decisions"],
            state["best_gain"],
        )


def made(config: Config) -> Bandit:
    """Make the bandit that the settings name.

    Raises:
        RegistryError: There is none of that name.
        ConfigError: It does not take one of ``bandit_settings``, or not such a value.
    """
    kind = BANDITS.get(config.bandit)
    known = list(inspect.signature(kind).parameters)
    for name in config.bandit_settings:
        if name not in known:
            takes = nearest(name, known) if known else "it takes none"
            raise ConfigError(f"bandit_settings: {config.bandit} does not take {quoted(name)}; {takes}")
    try:
        return kind(**config.bandit_settings)
    except (ConfigError, TypeError, ValueError) as error:  # another package's may raise the latter two
        raise ConfigError(f"bandit_settings of {config.bandit}: {error}") from None


def facts(arm: Arm) -> ArmFacts:
    """Tell an arm as decisions and events do."""
    return ArmFacts(
        site=arm.site,
        share=arm.share,
        width=arm.width,
        start=arm.start,
        score=arm.score,
        prior=arm.prior,
        features=arm.features,
    )


def why_none(room: RemainingBudget, most: Mapping[str, int]) -> str:
    """Say why nothing is chosen.

    Args:
        room: Rest of the budget.
        most: Units that it pays for, by site that was asked.
    """
    if room.events <= 0 or (most and all(units < 1 for units in most.values())):
        return "the budget is spent"
    return "no site promises an improvement" if most else "no site is free"
