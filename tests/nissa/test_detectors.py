"""What is an alarm and what is not, and that a saved detector goes on as the one that was not."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import RegistryError
from esper.nissa.baseline import LEAST, WINDOW, RobustBaseline
from esper.nissa.detectors import DETECTORS, Finding, Vitals, begun, looked
from esper.nissa.detectors.robust import BLOCK, Detectors
from esper.testing.detectors import check_detector


def healthy(steps: int, seed: int = 0, noise: float = 0.3) -> list[Vitals]:
    """A loss that falls to a level, with skewed noise, and a gradient norm that does as it likes."""
    random = np.random.default_rng(seed)
    losses = (0.1 + np.exp(-np.arange(steps) / 200)) * np.exp(noise * random.standard_normal(steps))
    gradients = np.exp(0.7 * random.standard_normal(steps))
    return [Vitals(float(a), float(b), True, 1e-3) for a, b in zip(losses, gradients, strict=True)]


def findings(run: list[Vitals], detectors: Detectors | None = None, first: int = 1) -> list[Finding]:
    detectors = detectors or Detectors()
    found = [detectors.look(vitals, step) for step, vitals in enumerate(run, first)]
    return [finding for finding in found if finding is not None]


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5])
def test_noise_and_falling_losses_are_no_alarm(noise: float) -> None:
    assert findings(healthy(3000, noise=noise)) == []


def test_negative_losses_are_as_good_as_others() -> None:
    run = [Vitals(v.loss - 3.0, v.gradient, True, 1e-3) for v in healthy(1000)]
    assert findings(run) == []
    (found,) = findings([*run, Vitals(300.0, 1.0, True, 1e-3)])
    assert (found.kind, found.signal) == ("spike", "loss")


@pytest.mark.parametrize(
    ("vitals", "signal"),
    [
        (Vitals(math.nan, 1.0, True), "loss"),
        (Vitals(math.inf, None), "loss"),
        (Vitals(1.0, math.nan, True), "gradient"),
        (Vitals(1.0, 1.0, False), "weights"),
    ],
)
def test_what_is_not_finite_is_told_at_once_even_where_something_is_expected(
    vitals: Vitals, signal: str
) -> None:
    detectors = Detectors()
    detectors.expect(0, "a new task", 100)
    for step in (1, 2):  # and at the very first step, and every time
        found = detectors.look(vitals, step)
        assert found is not None
        assert (found.kind, found.signal, found.step, found.expected) == ("nonfinite", signal, step, "")


def test_a_thousandfold_gradient_is_told_in_its_step() -> None:
    run = healthy(400)
    spoilt = [*run[:300], Vitals(run[300].loss, 1000 * (run[300].gradient or 0), True, 0.001), *run[301:]]
    (found,) = findings(spoilt)
    assert (found.kind, found.signal, found.step) == ("spike", "gradient", 301)


def test_moderate_evidence_adds_up_over_steps_and_says_since_when() -> None:
    run = healthy(1000)
    raised = [Vitals(4 * v.loss, 3 * (v.gradient or 0), True, 1e-3) for v in run[900:]]
    found = findings(run[:900] + raised)[0]
    assert found.kind == "spike"
    assert 901 <= found.since <= found.step <= 906
    assert findings(run[:900] + raised[:1] + run[901:]) == []  # one such step is chance


def test_without_gradients_the_loss_speaks_for_both() -> None:
    run = [Vitals(v.loss) for v in healthy(400)]
    assert findings(run) == []
    assert findings(run[:300] + [Vitals(5 * v.loss) for v in run[300:]])[0].step <= 304


def test_a_slow_rise_is_divergence() -> None:
    random = np.random.default_rng(1)
    losses = np.exp(0.3 * random.standard_normal(40 * BLOCK))
    losses[20 * BLOCK :] *= np.exp(np.arange(20 * BLOCK) / 400)
    found = findings([Vitals(float(loss)) for loss in losses])
    assert found[0].kind in ("divergence", "spike")  # eight steps in a row may be rare already
    assert 20 * BLOCK < found[0].step < 28 * BLOCK


def test_a_rate_that_leaps_beyond_all_before_is_told_and_a_warm_up_is_not() -> None:
    warm = [Vitals(v.loss, v.gradient, True, min(1e-7 + i * 1e-4, 1e-3)) for i, v in enumerate(healthy(400))]
    assert findings(warm) == []
    restarted = [Vitals(v.loss, v.gradient, True, 1e-3 if i % 100 else 1e-6) for i, v in enumerate(warm)]
    assert findings(restarted) == []
    (found,) = findings([*warm, Vitals(warm[-1].loss, warm[-1].gradient, True, 0.1)])
    assert (found.kind, found.size) == ("rate", pytest.approx(100))


def test_an_expected_discontinuity_is_annotated_and_only_for_its_while() -> None:
    run = healthy(600)
    leap = [Vitals(100 * v.loss, v.gradient, True, 1e-3) for v in run[300:]]
    detectors = Detectors()
    assert findings(run[:300], detectors) == []
    detectors.expect(300, "other data", 24)
    found = findings(leap[:20], detectors, 301)
    assert found
    assert {one.expected for one in found} == {"other data"}
    assert findings(run[320:], detectors, 325) == []  # back where it was


def test_a_graft_excuses_only_so_much() -> None:
    run = healthy(301)
    detectors = Detectors()
    findings(run[:300], detectors)
    detectors.expect(300, "a graft", 24, 2.5)
    found = detectors.look(Vitals(1e6, run[300].gradient, True), 301)
    assert found is not None
    assert found.expected == ""


@given(cut=st.integers(1, 399), seed=st.integers(0, 20))
def test_a_saved_detector_goes_on_bit_for_bit(cut: int, seed: int) -> None:
    run = healthy(400, seed)
    run[350] = Vitals(40 * run[350].loss, 1e4, True, 0.5)
    whole, before, after = Detectors(), Detectors(), Detectors()
    expected = findings(run, whole)
    first = findings(run[:cut], before)
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert first + findings(run[cut:], after, cut + 1) == expected
    assert after.state_dict() == whole.state_dict()


@given(st.lists(st.floats(-1e6, 1e6), min_size=LEAST, max_size=3 * WINDOW))
def test_the_sorted_window_is_the_window_sorted(values: list[float]) -> None:
    usual = RobustBaseline()
    for value in values:
        usual.add(value)
    assert usual.ordered == sorted(usual.recent)
    assert len(usual.recent) <= WINDOW


@pytest.mark.parametrize("name", DETECTORS.names())
def test_every_detector_holds_its_suite(name: str) -> None:
    assert [demand for demand, held in check_detector(DETECTORS.get(name)) if not held] == []


OTHERS = """
class Cannot:
    def __init__(self): raise KeyError("no")
class Lacks:
    def look(self, vitals, step): return None
class Fails(Lacks):
    def look(self, vitals, step): raise RuntimeError("look")
    def expect(self, *given): pass
    def doubts(self): return False
    def forget(self): pass
    def state_dict(self): return {}
    def load_state_dict(self, state): pass
class Says(Fails):
    def look(self, vitals, step): return "yes"
"""


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("Cannot", "cannot be made: KeyError"),
        ("Lacks", "has no expect, doubts"),
        ("Fails", "failed at step 3: RuntimeError: look"),
        ("Says", "found a str"),
    ],
)
def test_a_detector_of_another_package_that_is_none_is_named(
    name: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "neighbour_detectors-1.0.dist-info"
    info.mkdir()
    (tmp_path / "neighbour_detectors.py").write_text(OTHERS)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: neighbour-detectors\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[esper.detectors]\nneighbour = neighbour_detectors:{name}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RegistryError, match=f"the detector neighbour {what}"):
        looked(begun("neighbour"), "neighbour", Vitals(1.0), 3)
