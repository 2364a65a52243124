"""The detector suite: what every detector must hold."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import get_args

from esper.nissa.detectors import Detector, Finding, Kind, Vitals

STEADY = [Vitals(1 + 0.1 * math.sin(step), 2 + 0.1 * math.cos(step), True, 0.1) for step in range(200)]
WILD = [*STEADY, *[Vitals(1e6, 1e6, True, 0.1)] * 4, *STEADY[:50]]
WHY = "a graft"


def check_detector(new: Callable[[], Detector]) -> list[tuple[str, bool]]:
    """Hold a detector to every demand of its contract.

    Args:
        new: Function that returns one that has seen nothing, another one each time.

    Returns:
        Each demand, and whether it holds.
    """
    return [(name.replace("_", " "), demand(new)) for name, demand in DEMANDS.items()]


def seen(detector: Detector, run: Sequence[Vitals], first: int = 1) -> list[Finding]:
    """Let a detector look at a run; returns its findings."""
    looked = [detector.look(vitals, step) for step, vitals in enumerate(run, first)]
    return [finding for finding in looked if finding is not None]


def a_steady_run_is_left_alone(new: Callable[[], Detector]) -> bool:
    """A loss that swings by a tenth is nothing."""
    return not seen(new(), STEADY)


def what_is_not_finite_is_found_at_once(new: Callable[[], Detector]) -> bool:
    """In the first step as in any other, in whichever sign."""
    lost = [Vitals(math.nan), Vitals(math.inf), Vitals(1.0, math.nan), Vitals(1.0, 1.0, False)]
    found = [seen(new(), [*before, one])[-1:] for one in lost for before in (STEADY[:0], STEADY)]
    return all(one and one[0].kind == "nonfinite" and not one[0].expected for one in found)


def findings_are_of_known_kinds_and_steps(new: Callable[[], Detector]) -> bool:
    """A kind has a ladder in the settings; evidence began no later than the step."""
    return all(one.kind in get_args(Kind) and 0 <= one.since <= one.step for one in seen(new(), WILD))


def what_is_expected_is_annotated(new: Callable[[], Detector]) -> bool:
    """Where a discontinuity was announced no finite value is an alarm; afterwards it is as without."""
    detector = new()
    seen(detector, STEADY)
    detector.expect(len(STEADY), WHY, 10)
    return all(one.expected == WHY for one in seen(detector, WILD[len(STEADY) :][:10], len(STEADY) + 1))


def the_same_numbers_give_the_same_findings(new: Callable[[], Detector]) -> bool:
    """No clock and no randomness: a run is repeated by its seed."""
    return seen(new(), WILD) == seen(new(), WILD)


def a_fresh_start_is_quiet(new: Callable[[], Detector]) -> bool:
    """Behind a way back a healthy run is healthy, whatever was seen before, and nothing is in doubt."""
    detector = new()
    seen(detector, WILD[:204])
    detector.forget()
    return not detector.doubts() and not seen(detector, STEADY, 205)


def what_was_seen_goes_through_json(new: Callable[[], Detector]) -> bool:
    """A detector that takes over a state, read back from JSON, goes on as the other would have."""
    one, other = new(), new()
    seen(one, WILD[:150])
    one.expect(150, WHY, 60)
    other.load_state_dict(json.loads(json.dumps(dict(one.state_dict()))))
    return seen(one, WILD[150:], 151) == seen(other, WILD[150:], 151) and one.doubts() == other.doubts()


DEMANDS: dict[str, Callable[[Callable[[], Detector]], bool]] = {
    demand.__name__: demand
    for demand in (
        a_steady_run_is_left_alone,
        what_is_not_finite_is_found_at_once,
        findings_are_of_known_kinds_and_steps,
        what_is_expected_is_annotated,
        the_same_numbers_give_the_same_findings,
        a_fresh_start_is_quiet,
        what_was_seen_goes_through_json,
    )
}
