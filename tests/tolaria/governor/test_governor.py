"""The ladder: what is done at the first alarm, at the next ones, and when growth goes on."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from esper.errors import ConfigError
from esper.tolaria.governor import Actions, Finding, Governor, Settings, Vitals
from esper.tolaria.governor.governor import Action

NAN, FINE = Vitals(math.nan), Vitals(1.0, 1.0, True, 0.1)


class Conductor:
    """Writes down what it is asked to do."""

    def __init__(self, steps: int | None = 5, **settings: Any) -> None:
        self.done: list[str] = []
        actions = Actions(self.notify, self.hold, self.release, lambda finding: steps, self.stop)
        self.governor = Governor(Settings(**settings), actions)

    def notify(self, finding: Finding, action: Action) -> None:
        self.done.append(f"{action}{' expected' if finding.expected else ''}")

    def hold(self, finding: Finding) -> None:
        self.done.append("held")

    def release(self) -> None:
        self.done.append("released")

    def stop(self, finding: Finding) -> None:
        self.done.append("stopped")

    def go(self, *steps: tuple[int, Vitals]) -> list[Action | None]:
        return [self.governor.check(vitals, step) for step, vitals in steps]


def test_a_ladder_is_climbed_while_alarms_are_near_each_other() -> None:
    run = Conductor(nonfinite=("notify", "hold", "rollback"), memory=50)
    assert run.go((1, NAN), (10, NAN), (20, NAN), (60, NAN)) == ["notify", "hold", "rollback", "rollback"]
    assert run.go((200, NAN)) == ["notify"]
    assert run.governor.lost == 10


def test_growth_is_held_until_it_has_been_calm() -> None:
    run = Conductor(calm=10)
    assert run.go((5, NAN), *((step, FINE) for step in range(6, 20))) == ["rollback", *[None] * 14]
    assert run.done == ["held", "rollback", "released"]


def test_rollbacks_that_do_not_help_end_in_a_stop() -> None:
    run = Conductor(rollbacks=2)
    assert run.go((1, NAN), (2, NAN), (3, NAN)) == ["rollback", "rollback", "stop"]
    assert run.done[-2:] == ["stop", "stopped"]


def test_where_there_is_no_way_back_the_run_stops() -> None:
    assert Conductor(steps=None).go((1, NAN)) == ["stop"]


def test_a_spike_while_a_seed_is_exposed_is_graver() -> None:
    run = Conductor()
    run.go(*((step, FINE) for step in range(1, 100)))
    assert run.governor.check(Vitals(1e6, 1.0, True, 0.1), 100, "rollback") == "rollback"


def test_expected_findings_are_told_and_not_acted_on() -> None:
    run = Conductor(spike=("stop",))
    run.go(*((step, FINE) for step in range(1, 100)))
    run.governor.expect(99, "a new learning rate")
    assert run.go((100, Vitals(1e6, 1.0, True, 0.1))) == [None]
    assert run.done == ["notify expected"]
    assert run.governor.alarms == 0


def test_a_saved_governor_goes_on_where_it_was() -> None:
    before, after = (Conductor(nonfinite=("notify", "hold", "rollback"), calm=10) for _ in range(2))
    before.go((1, NAN), (5, NAN))
    after.governor.load_state_dict(json.loads(json.dumps(before.governor.state_dict())))
    later = [(9, NAN), *((step, FINE) for step in range(10, 30))]
    assert after.go(*later) == before.go(*later)
    assert after.governor.state_dict() == before.governor.state_dict()


@pytest.mark.parametrize("bad", [{"spike": ()}, {"rate": ("panic",)}, {"every": 0}, {"exposed": "hope"}])
def test_settings_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="governor"):
        Settings(**bad)
