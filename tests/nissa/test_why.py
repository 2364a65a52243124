import pytest

from esper.contracts import Event
from esper.errors import RunError
from esper.nissa.run.history import RunHistory, fold
from esper.nissa.views.why import as_text, why


def test_a_kept_growth_is_explained_from_what_it_saw_to_what_it_was_worth(history: RunHistory) -> None:
    (story,) = why(history, 1)
    assert story["verdict"] == "kept"
    assert [site["site"] for site in story["sites"]] == ["conv1>conv2", "conv2>fc"]
    assert len(story["arms"]) == 3
    assert story["propensity"] == 0.8
    assert story["predicted"] == 3.1e-6
    assert story["realised"] == pytest.approx(0.021 / (8 * 84 * 60))
    text = as_text(history, 1)
    assert text.startswith("Decision 1 at step 90: widen conv2>fc by 8 — kept")
    for fact in (
        "scheduled; conv2>fc promises most per FLOP",
        "conv2>fc: improvement 0.054, examples 512",
        "with probability 0.8",
        "0: start svd, loss 0.61  ← won",
        "gain 0.021 on 180 held out",
        "e-value 412 of 320 needed: passed",
        "+8 units at step 180 (conv2.weight axis 0: 4→12; conv2.bias axis 0: 4→12; fc.weight axis 1: 4→12)",
        "predicted 3.1e-06, realised 5.208e-07",
    ):
        assert fact in text


def test_a_refused_growth_has_no_realised_gain(history: RunHistory) -> None:
    (story,) = why(history, 2)
    assert story["realised"] is None
    assert story["widened"] is None
    assert "e-value 0.3 stayed below 320" in as_text(history, 2)


def test_waiting_is_explained_too(history: RunHistory) -> None:
    text = as_text(history, 3)
    assert "do nothing — waited" in text
    assert "no arm promises more than doing nothing" in text


def test_all_of_them_in_order(history: RunHistory) -> None:
    assert [story["decision"] for story in why(history)] == [1, 2, 3, 4]
    assert as_text(history).count("\nDecision") == 3


def test_an_unknown_decision_lists_those_there_are(history: RunHistory) -> None:
    with pytest.raises(RunError, match="no decision 9; its decisions: 1, 2, 3, 4"):
        why(history, 9)
    with pytest.raises(RunError, match="its decisions: none"):
        why(RunHistory(), 1)


def test_blocks_are_said_to_have_come_and_not_units() -> None:
    chosen = {"action": "widen", "site": "layers+block", "width": 2, "start": None, "reason": "", "arms": []}
    grown = {"decision": 1, "site": "layers+block", "difference": 0.0, "parameters": 70, "milliseconds": 2.0}
    history = fold(
        [
            Event("decision", 8, {"decision": 1, **chosen, "propensity": 1.0, "predicted": None}),
            Event("deepened", 8, {**grown, "index": 2, "blocks": 3}),
            Event("deepened", 8, {**grown, "index": 3, "blocks": 4}),
        ]
    )
    lines = as_text(history, 1).splitlines()
    assert lines[0].startswith("Decision 1 at step 8: deepen layers by 2 blocks — ")
    assert "  deepened +2 blocks at step 8, 4 in all" in lines
