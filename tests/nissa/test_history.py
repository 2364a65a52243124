from dataclasses import replace
from typing import Any

from esper.contracts import EVENT_FIELDS, Event, Refusal
from esper.nissa.run import history as module
from esper.nissa.run.history import RunHistory, fold
from esper.nissa.run.records import DecisionHistory, Resume


def without_survival(history: RunHistory) -> dict[str, Any]:
    return {name: value for name, value in history.totals.items() if name != "survived"}


def test_every_kind_of_event_is_folded() -> None:
    assert module._FOLDS.keys() == EVENT_FIELDS.keys()


def test_the_run_in_numbers(history: RunHistory) -> None:
    assert history.totals == {
        "model": "DigitsCNN",
        "growth": None,  # the stream is of a run that did not say
        "limits": {},
        "finished": True,
        "steps": 900,
        "parameters_before": 426,
        "parameters_after": 1138,
        "flops_before": 46_000,
        "flops_after": 104_000,
        "training_flops": 4_600_000 * 900,
        "growth_flops": 50_000_000,
        "seconds": 9.2,
        "metrics": history.epochs[-1].metrics,
        "survived": {
            "checkpoints": 0,
            "resumes": 0,
            "steps_redone": 0,
            "alarms": 0,
            "rollbacks": 0,
            "steps_rolled_back": 0,
            "taken_back": 0,
            "steps_taken_back": 0,
            "faults": 1,
            "processes_told": 0,
        },
        "decisions": 4,
        "kept": 2,
        "grown": [
            {"site": "conv1>conv2", "before": 4, "after": 8},
            {"site": "conv2>fc", "before": 8, "after": 16},
        ],
    }


def test_a_decision_is_joined_from_survey_to_outcome(history: RunHistory) -> None:
    refused = history.decisions[2]
    assert (refused.step, refused.decided_at, refused.verdict) == (270, 290, "refused")
    assert refused.survey[0]["site"] == "conv1>conv2"
    assert refused.chosen["reason"].startswith("brought forward")
    assert refused.race is not None
    assert refused.race["winner"] == 0
    assert [look["passed"] for look in refused.looks] == [False]
    assert refused.widened is None
    kept = history.decisions[4]
    assert (kept.widened_at, kept.verdict, kept.kept) == (570, "kept", True)
    assert history.decisions[3].verdict == "waited"
    assert [decision.id for decision in history.grown] == [1, 4]


def test_a_seed_s_stages_follow_each_other_without_gaps(history: RunHistory) -> None:
    seed = history.seeds["conv2>fc", "4"]
    assert [span.stage for span in seed.spans] == [
        "GERMINATED",
        "TRAINING",
        "GRAFTING",
        "STABILISING",
        "EVALUATING",
        "FOSSILISED",
        "DORMANT",
    ]
    assert [span.end for span in seed.spans[:-1]] == [span.start for span in seed.spans[1:]]
    assert seed.spans[-1].end is None
    assert seed.alpha.values[0] == 0.125
    assert seed.alpha.last == 1.0


def test_a_slot_used_twice_has_two_lives(history: RunHistory) -> None:
    first, second = history.seeds["conv1>conv2", "0"].lives
    assert [span.stage for span in first] == ["GERMINATED", "TRAINING", "CULLED"]
    assert (second[0].start, second[-1].stage) == (480, "FOSSILISED")


def test_stages_may_come_as_numbers() -> None:
    data = {"seed": 0, "site": "a>b", "source": 0, "target": 1, "reason": ""}
    assert fold([Event("stage", 5, data)]).seeds["a>b", "0"].stage == "GERMINATED"


def test_a_loss_that_was_not_finite_is_neither_hidden_nor_zero(history: RunHistory) -> None:
    at = history.loss.steps.index(520)
    assert history.loss.values[at] != history.loss.values[at]


def test_what_went_wrong_is_kept(history: RunHistory) -> None:
    assert [event.data["count"] for event in history.faults] == [1]
    assert [event.kind for event in history.fallbacks + history.warnings] == ["fallback", "warning"]
    assert history.refused == [Refusal("fc", "its outputs are the model's outputs, so their number is given")]


def test_an_empty_run_knows_nothing_and_says_so() -> None:
    totals = fold([]).totals
    assert totals["parameters_after"] is None
    assert totals["seconds"] is None
    assert totals["finished"] is False


def test_folding_one_by_one_is_folding_at_once(events: list[Event]) -> None:
    history = RunHistory()
    for event in events:
        history.add(event)
    assert history == fold(events)


def test_a_resumed_run_replaces_what_it_does_again(events: list[Event]) -> None:
    """Killed at step 520, resumed from a snapshot at 300: the events in between do not count."""
    begin, warning = events[0], next(event for event in events if event.kind == "warning")
    killed = [event for event in events if event.step <= 520]
    again = [event for event in events if event.step > 300]
    # A process that resumes starts a run like any other, then takes in the state.
    resumed = fold([*killed, begin, warning, replace(begin, step=300), *again])
    assert without_survival(resumed) == without_survival(fold(events))
    assert resumed.resumes == [Resume(300, None, 220)]
    assert resumed.loss == fold(events).loss
    assert resumed.decisions == fold(events).decisions
    assert resumed.seeds == fold(events).seeds


def test_a_run_resumed_twice_in_a_folder_of_several_runs(events: list[Event]) -> None:
    begin = events[0]
    again = [event for event in events if event.step > 300]
    resumed = [begin, replace(begin, step=300), *again]
    assert fold([*events, *events, *resumed, *resumed]).loss == fold(events).loss


def test_a_new_run_in_an_old_folder_starts_from_nothing(events: list[Event]) -> None:
    assert fold([*events, *events]) == fold(events)


def test_a_block_that_was_asked_for_by_hand_counts_its_parameters() -> None:
    facts = {"decision": None, "site": "blocks+block", "blocks": 3, "parameters": 70, "difference": 0.0}
    history = fold([Event("deepened", 5, {**facts, "milliseconds": 2.0})])
    assert history.decisions == {}
    assert history.parameters.last == 70


def test_a_grafted_decision_is_judged_like_a_widening() -> None:
    decision = DecisionHistory(1, 5, chosen={"action": "graft", "site": "head+residual_mlp"})
    assert decision.verdict == "open"
    decision.outcome = {"kept": True}
    assert decision.verdict == "kept"
