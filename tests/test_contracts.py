"""The shared nouns are frozen, complete and never pretend to know."""

import dataclasses
import inspect
from typing import Any

import pytest

from esper import contracts
from esper.contracts import EVENT_FIELDS, Event, HealthReport, Outcome, Site, Stage, WidenEdit, WidenPlan

NOUNS = [
    value
    for value in vars(contracts).values()
    if inspect.isclass(value) and dataclasses.is_dataclass(value) and value.__module__ == contracts.__name__
]


@pytest.mark.parametrize("noun", NOUNS, ids=lambda noun: noun.__name__)
def test_nouns_are_frozen_and_slotted(noun: Any) -> None:
    assert noun.__dataclass_params__.frozen
    assert "__slots__" in vars(noun)


@pytest.mark.parametrize("kind", EVENT_FIELDS)
def test_event_refuses_what_lacks_a_field(kind: str) -> None:
    data = dict.fromkeys(EVENT_FIELDS[kind], 0)
    assert Event(kind, 3, data).data == data
    assert Event(kind, 3, {**data, "more": 1}).data["more"] == 1
    missing = EVENT_FIELDS[kind][0]
    del data[missing]
    with pytest.raises(ValueError, match=f"event '{kind}' lacks {missing}"):
        Event(kind, 3, data)


def test_event_refuses_an_unknown_kind() -> None:
    with pytest.raises(ValueError, match="unknown event kind 'groth'; known: run_started"):
        Event("groth", 0, {})


def test_the_default_observer_takes_any_event() -> None:
    contracts.ignore(Event("warning", 0, {"message": "unheard"}))


def test_stage_values_are_stored_so_they_never_move() -> None:
    assert {stage.name: stage.value for stage in Stage} == {
        "DORMANT": 0,
        "GERMINATED": 1,
        "TRAINING": 2,
        "GRAFTING": 3,
        "STABILISING": 4,
        "EVALUATING": 5,
        "FOSSILISED": 6,
        "CULLED": 7,
        "EMBARGOED": 8,
        "ERROR": 9,
        "ROLLED_BACK": 10,
    }


def test_what_was_not_measured_is_none() -> None:
    report = HealthReport(site="fc1>fc2", improvement=None, examples=0)
    optional = {field.name for field in dataclasses.fields(report)} - {"site", "examples"}
    assert all(getattr(report, name) is None for name in optional)


def test_nouns_compare_by_value() -> None:
    edit = WidenEdit("fc1.weight", axis=0, old=4, new=8, source="up.weight")
    plan = WidenPlan("fc1>fc2", 4, (edit,), (("fc1", "out_features", 8),))
    assert plan == dataclasses.replace(plan)
    assert hash(plan) == hash(dataclasses.replace(plan))
    assert plan != dataclasses.replace(plan, units=5)
    site = Site("fc1>fc2", "pair", "fc1", "fc2", ("ReLU",), 4, 1, 75, 148)
    assert site != dataclasses.replace(site, width=5)
    outcome = Outcome(1, "fc1>fc2", True, None, 300, 600, 10_000, "kept")
    assert dataclasses.asdict(outcome)["gain"] is None
