"""The types of events' data are what every event of the kind carries: what they require is never lacking."""

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
    assert told.__required_keys__ <= set(EVENT_FIELDS[kind])
