"""The types of events' data are what every event of the kind carries: what they require is never lacking."""

from typing import NotRequired, get_origin, get_type_hints

import pytest

from esper.contracts import EVENT_FIELDS
from esper.nissa.run import facts

KINDS = {
    "run_started": facts.RunStarted,
    "run_finished": facts.RunFinished,
    "decision": facts.DecisionFacts,
    "race": facts.RaceFacts,
    "gate": facts.LookFacts,
    "outcome": facts.OutcomeFacts,
    "widened": facts.GrownFacts,
    "grafted": facts.GrownFacts,
    "deepened": facts.GrownFacts,
    "reopened": facts.ReopenedFacts,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_type_knows_every_field_of_its_event_and_requires_no_other(kind: str) -> None:
    told = KINDS[kind]
    assert set(EVENT_FIELDS[kind]) <= set(told.__annotations__)
    hints = get_type_hints(told, include_extras=True)
    required = {name for name, hint in hints.items() if get_origin(hint) is not NotRequired}
    assert not told.__total__ or required <= set(EVENT_FIELDS[kind])
