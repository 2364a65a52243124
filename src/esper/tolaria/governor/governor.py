"""``Governor``: what is done about a finding, by severity: notify, hold growth, roll back, stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypedDict

from esper.errors import ConfigError
from esper.nissa.detectors import Finding, Vitals, begun, looked

Action = Literal["notify", "hold", "rollback", "stop"]
ACTIONS: tuple[Action, ...] = ("notify", "hold", "rollback", "stop")  # by severity


@dataclass(frozen=True)
class Settings:
    """What the governor does, and when.

    Each ladder lists what is done at the first alarm of its kind, the second, and so on; the last rung is
    repeated. Alarms count together while none is further than ``memory`` steps from the one before.
    """

    nonfinite: tuple[Action, ...] = ("rollback",)
    spike: tuple[Action, ...] = ("notify", "hold", "rollback")
    divergence: tuple[Action, ...] = ("notify", "hold")
    rate: tuple[Action, ...] = ("notify",)
    exposed: Action = "rollback"  # at least, at a spike while a seed is exposed
    memory: int = 256
    rollbacks: int = 3  # within ``memory`` of each other; one more is a stop
    calm: int = 64  # steps without an alarm until held growth goes on
    every: int = 100  # steps from one snapshot to the next
    grace: int = 24  # steps a discontinuity is expected to show, unless it is told otherwise
    detector: str = "robust"  # what looks at the vital signs, by name

    def __post_init__(self) -> None:
        for kind in ("nonfinite", "spike", "divergence", "rate"):
            ladder = getattr(self, kind)
            if not ladder or any(rung not in ACTIONS for rung in ladder):
                raise ConfigError(f"governor.{kind} is {ladder!r}; give at least one of {', '.join(ACTIONS)}")
        if self.exposed not in ACTIONS:
            raise ConfigError(f"governor.exposed is {self.exposed!r}; give one of {', '.join(ACTIONS)}")
        for name in ("memory", "rollbacks", "calm", "every", "grace"):
            if getattr(self, name) < (0 if name == "rollbacks" else 1):
                raise ConfigError(f"governor.{name} is {getattr(self, name)}; that is too few")


@dataclass(frozen=True)
class Actions:
    """What the governor may do; the conductor says how."""

    notify: Callable[[Finding, Action], None]  # of every finding; "notify" too where it was expected
    hold: Callable[[Finding], None]  # growth: no new decision
    release: Callable[[], None]  # growth goes on
    rollback: Callable[[Finding], int | None]  # steps lost, or None where there is no way back
    stop: Callable[[Finding], None]


class GovernorState(TypedDict):
    """What later actions depend on."""

    detectors: Mapping[str, object]
    rungs: dict[str, int]  # kind -> alarms in a row
    latest: dict[str, int]  # kind -> step
    turned: list[int]  # steps of rollbacks
    held: int | None  # step
    counts: list[int]  # steps lost, alarms
    trouble: list[int | None]  # its first step, step of the latest alarm


class Governor:
    """Looks at every step's vital signs and acts on what it finds.

    Attributes:
        lost: Steps undone by rollbacks so far.
        alarms: Findings acted on so far.
        trouble: Step of the first evidence of what is not over yet; what was seen since may have felt it.
    """

    def __init__(self, settings: Settings, actions: Actions) -> None:
        self.settings, self.actions = settings, actions
        self.detector = begun(settings.detector)
        self.rungs: dict[str, int] = {}  # kind -> alarms in a row
        self.latest: dict[str, int] = {}  # kind -> step of the latest
        self.turned: list[int] = []  # steps of rollbacks, while they are near each other
        self.held: int | None = None  # step of the latest alarm while growth is held
        self.trouble: int | None = None
        self.alarmed = 0  # step of the latest alarm of any kind
        self.lost = self.alarms = 0

    def expect(self, step: int, why: str, steps: int | None = None, excused: float = math.inf) -> None:
        """Announce a discontinuity: a graft, a widening, a new learning rate.

        Args:
            step: When it begins.
            why: What findings are annotated with.
            steps: How long it may show; None: the settings' grace.
            excused: e-folds above anything recent that stay an alarm; values that are not finite always do.
        """
        self.detector.expect(step, why, self.settings.grace if steps is None else steps, excused)

    def check(self, vitals: Vitals, step: int, least: Action = "notify") -> Action | None:
        """Look at a step that has been done.

        Args:
            vitals: Of the step.
            step: Its number.
            least: What is done about a spike at least.

        Returns:
            What was done about it, None where all is well.

        Raises:
            RegistryError: A detector of another package failed.
        """
        finding = looked(self.detector, self.settings.detector, vitals, step)
        if finding is None:
            if step - self.alarmed >= self.settings.calm:
                self.trouble = None
            if self.held is not None and step - self.held >= self.settings.calm:
                self.held = None
                self.actions.release()
            return None
        if finding.expected:
            self.actions.notify(finding, "notify")
            return None
        self.alarms += 1
        self.alarmed = step
        self.trouble = finding.since if self.trouble is None else min(self.trouble, finding.since)
        return self.act(finding, self.rung(finding, least if finding.kind == "spike" else "notify"))

    def rung(self, finding: Finding, least: Action) -> Action:
        """Choose the action by how many alarms of the kind came one after another."""
        kind, step, memory = finding.kind, finding.step, self.settings.memory
        near = step - self.latest.get(kind, -memory - 1) <= memory
        self.rungs[kind] = self.rungs[kind] + 1 if near else 0
        self.latest[kind] = step
        ladder: tuple[Action, ...] = getattr(self.settings, kind)
        action = ladder[min(self.rungs[kind], len(ladder) - 1)]
        action = max(action, least, key=ACTIONS.index)
        if action == "rollback":
            self.turned = [s for s in self.turned if step - s <= memory]
            if len(self.turned) >= self.settings.rollbacks:
                return "stop"
        return action

    def act(self, finding: Finding, action: Action) -> Action:
        """Carry out an action; what cannot be rolled back stops."""
        if action in ("hold", "rollback") or self.held is not None:
            if self.held is None:
                self.actions.hold(finding)
            self.held = finding.step
        if action == "rollback":
            steps = self.actions.rollback(finding)
            if steps is None:
                action = "stop"
            else:
                self.lost += steps
                self.turned.append(finding.step)
                self.trouble = None
                self.detector.forget()
        self.actions.notify(finding, action)
        if action == "stop":
            self.actions.stop(finding)
        return action

    def undo(self, finding: Finding, excused: float) -> Action:
        """Roll back for a seed's fault; it is gone then, so growth is not held and no rung is climbed.

        Args:
            finding: What the seed did.
            excused: e-folds by which the way back may raise the loss.
        """
        self.alarms += 1
        steps = self.actions.rollback(finding)
        if steps is not None:
            self.lost += steps
            self.expect(finding.step, f"a seed was undone at step {finding.step}", excused=excused)
        action: Action = "stop" if steps is None else "rollback"
        self.actions.notify(finding, action)
        if steps is None:
            self.actions.stop(finding)
        return action

    def state_dict(self) -> GovernorState:
        """Return everything later actions depend on; snapshots stay in memory."""
        return {
            "detectors": self.detector.state_dict(),
            "rungs": dict(self.rungs),
            "latest": dict(self.latest),
            "turned": list(self.turned),
            "held": self.held,
            "counts": [self.lost, self.alarms],
            "trouble": [self.trouble, self.alarmed],
        }

    def load_state_dict(self, state: GovernorState) -> None:
        """Go on governing."""
        self.detector.load_state_dict(state["detectors"])
        self.rungs, self.latest = dict(state["rungs"]), dict(state["latest"])
        self.turned, self.held = list(state["turned"]), state["held"]
        self.lost, self.alarms = state["counts"]
        self.trouble, alarmed = state["trouble"]
        self.alarmed = alarmed or 0
