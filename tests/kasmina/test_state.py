"""The life of a seed, against the design's table written out once more."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from esper.contracts import Stage
from esper.errors import ConfigError, TransitionError
from esper.kasmina.seeds.state import AWAKE, VITALS, KasminaStateLayout

SEEDS = 3
LIFE = ["DORMANT", "GERMINATED", "TRAINING", "GRAFTING", "STABILISING", "EVALUATING", "FOSSILISED", "DORMANT"]
LEGAL = {(Stage[a], Stage[b]) for a, b in itertools.pairwise(LIFE)}
for awake in LIFE[1:6]:
    LEGAL |= {(Stage[awake], stage) for stage in (Stage.CULLED, Stage.ERROR, Stage.ROLLED_BACK)}
LEGAL.add((Stage.GERMINATED, Stage.STABILISING))  # an early event: evidence first, no incubation, no α
LEGAL |= {(Stage.ERROR, Stage.CULLED), (Stage.ROLLED_BACK, Stage.CULLED)}
LEGAL |= {(Stage.CULLED, Stage.EMBARGOED), (Stage.EMBARGOED, Stage.DORMANT)}

seeds, stages = st.integers(0, SEEDS - 1), st.sampled_from(list(Stage))


class Life(RuleBasedStateMachine):
    """Asks for any move whatever and expects what the table says, no more and no less."""

    def __init__(self) -> None:
        super().__init__()
        self.layout = KasminaStateLayout(SEEDS)
        self.expected = [Stage.DORMANT] * SEEDS
        self.moved = [0] * SEEDS
        self.step = 0

    @rule(seed=seeds, source=stages, to=stages)
    def ask_for_anything(self, seed: int, source: Stage, to: Stage) -> None:
        self.attempt(seed, source, to)

    @rule(seed=seeds, to=stages)
    def ask_from_the_present_stage(self, seed: int, to: Stage) -> None:
        self.attempt(seed, self.expected[seed], to)

    def attempt(self, seed: int, source: Stage, target: Stage) -> None:
        self.step += 1
        if source is self.expected[seed] and (source, target) in LEGAL:
            self.layout.move(seed, source, target, self.step)
            self.expected[seed], self.moved[seed] = target, self.step
        else:
            with pytest.raises(TransitionError, match=target.name):
                self.layout.move(seed, source, target, self.step)

    @rule(seed=seeds, gain=st.floats(-10, 10))
    def measure(self, seed: int, gain: float) -> None:
        self.layout.observe_gain(seed, gain)
        self.layout.observe_seed(seed, gradient=abs(gain))
        self.layout.ramp(seed, 3)

    @rule(seed=seeds)
    def forget(self, seed: int) -> None:
        self.layout.clear(seed)
        assert self.layout.gain[seed].isnan()
        assert self.layout.vitals_of(seed) == dict.fromkeys(VITALS)
        assert float(self.layout.alpha[seed]) == int(self.layout.faults[seed]) == 0
        assert float(self.layout.slope[seed]) == 0

    @rule()
    def save_and_load(self) -> None:
        fresh = KasminaStateLayout(SEEDS)
        fresh.load_state_dict(self.layout.state_dict())
        self.layout = fresh

    @invariant()
    def only_the_asked_seed_moved(self) -> None:
        assert [self.layout.stage_of(s) for s in range(SEEDS)] == self.expected
        assert self.layout.changed.tolist() == self.moved


Life.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_no_illegal_move_is_reachable = Life.TestCase


def test_every_stage_can_be_left_and_none_is_active_before_the_gate() -> None:
    assert {source for source, _ in LEGAL} == set(Stage)
    assert {target for _, target in LEGAL} == set(Stage)
    active = {Stage.GRAFTING, Stage.STABILISING, Stage.EVALUATING, Stage.FOSSILISED}
    assert {s for s, t in LEGAL if t in active and s not in active} == {Stage.TRAINING, Stage.GERMINATED}
    assert {source for source, target in LEGAL if target is Stage.ERROR} == AWAKE


def test_stages_are_stored_by_number_so_the_numbers_stay() -> None:
    names = "DORMANT GERMINATED TRAINING GRAFTING STABILISING EVALUATING FOSSILISED CULLED EMBARGOED "
    names += "ERROR ROLLED_BACK"
    assert [stage.name for stage in sorted(Stage)] == names.split()


def test_a_refusal_says_where_the_seed_is_and_where_it_could_go() -> None:
    layout = KasminaStateLayout(2)
    with pytest.raises(TransitionError, match="seed 1 is DORMANT, not TRAINING"):
        layout.move(1, Stage.TRAINING, Stage.GRAFTING, 0)
    with pytest.raises(TransitionError, match="from DORMANT to GRAFTING; from there: GERMINATED"):
        layout.move(1, Stage.DORMANT, Stage.GRAFTING, 0)


def test_gain_is_unknown_until_measured_then_smoothed() -> None:
    layout = KasminaStateLayout(1, smoothing=0.25)
    assert math.isnan(float(layout.gain[0]))
    layout.observe_gain(0, 8.0)
    layout.observe_gain(0, 4.0)
    assert float(layout.gain[0]) == 7.0
    assert [layout.add_fault(0), layout.add_fault(0)] == [1, 2]


measurements = st.lists(
    st.lists(
        st.one_of(st.just(math.nan), st.floats(0, 128, width=32)), min_size=len(VITALS), max_size=len(VITALS)
    ),
    min_size=1,
    max_size=6,
)


@given(st.lists(measurements, min_size=1, max_size=SEEDS), st.sampled_from([0.1, 0.5, 1.0]))
def test_all_rows_at_once_are_smoothed_as_one_by_one(
    lives: list[list[list[float]]], smoothing: float
) -> None:
    together, alone = KasminaStateLayout(SEEDS, smoothing), KasminaStateLayout(SEEDS, smoothing)
    for step in range(max(map(len, lives))):
        samples = torch.full((len(VITALS), SEEDS), math.nan)
        for seed, life in enumerate(lives):
            if step < len(life):
                samples[:, seed] = torch.tensor(life[step])
                alone.observe_seed(seed, **dict(zip(VITALS, life[step], strict=True)))
        together.observe(samples)
    torch.testing.assert_close(together.vitals, alone.vitals, equal_nan=True, rtol=1e-5, atol=1e-4)
    for seed, life in enumerate(lives):
        for row, name in enumerate(VITALS):
            expected = None
            for value in (sample[row] for sample in life if not math.isnan(sample[row])):
                expected = value if expected is None else expected + smoothing * (value - expected)
            if expected is not None:
                expected = pytest.approx(expected, rel=1e-5, abs=1e-4)
            assert together.vitals_of(seed)[name] == expected
    assert together.vitals[:, len(lives) :].isnan().all()


def test_an_infinite_vital_is_seen_and_does_not_stay() -> None:
    layout = KasminaStateLayout(2)
    layout.observe_seed(0, variance=1.0, gradient=2.0, dead=0.0)
    layout.observe(torch.tensor([[1.0, math.nan], [math.inf, math.nan], [0.0, math.nan], [1.0, math.nan]]))
    assert layout.vitals_of(0)["gradient"] == math.inf
    assert layout.health_score(0) == 0.0
    for _ in range(2):
        layout.observe(torch.ones(len(VITALS), 2))
    assert layout.vitals_of(0)["gradient"] == 1.0


def test_health_is_unknown_until_every_part_of_it_is_measured() -> None:
    layout = KasminaStateLayout(2)
    assert layout.health_score(0) is None
    layout.observe_seed(0, variance=2.0, dead=0.25, latency=1e-4)
    assert layout.health_score(0) is None
    layout.observe_seed(0, gradient=0.5)
    assert layout.health_score(0) == 0.75
    layout.add_fault(0)
    assert layout.health_score(0) == 0.375
    assert layout.health_score(1) is None
    layout.observe_seed(1, variance=0.0, dead=0.0, gradient=1.0)
    assert layout.health_score(1) == 0.0
    with pytest.raises(ConfigError, match="no vital pulse; known: variance, gradient, dead, latency"):
        layout.observe_seed(0, pulse=1.0)


@pytest.mark.parametrize("steps", [1, 3, 7, 10, 1000])
def test_alpha_climbs_its_ramp_and_comes_down_again(steps: int) -> None:
    layout = KasminaStateLayout(3)
    layout.alpha[2] = 0.5
    layout.ramp(0, steps)
    for _ in range(steps):
        layout.tick()
    assert layout.alpha.tolist() == pytest.approx([1.0, 0.0, 0.5], abs=1e-5)
    layout.ramp(0, 0)
    layout.tick()
    layout.ramp(0, -steps)
    for _ in range(steps + 1):
        layout.tick()
    assert layout.alpha.tolist() == [0.0, 0.0, 0.5]


@pytest.mark.parametrize(("smoothing", "sampling"), [(0.0, 1), (1.1, 1), (math.nan, 1), (0.1, 0)])
def test_settings_out_of_range_are_refused(smoothing: float, sampling: int) -> None:
    with pytest.raises(ConfigError, match="smoothing must be in"):
        KasminaStateLayout(1, smoothing, sampling)


def test_vitals_are_due_every_kth_step() -> None:
    layout = KasminaStateLayout(1, sampling=4)
    assert [step for step in range(10) if layout.due(step)] == [0, 4, 8]


def test_samples_of_many_threads_all_count() -> None:
    layout = KasminaStateLayout(2, smoothing=1.0)
    layout.ramp(0, 1000)

    def work() -> None:
        for _ in range(100):
            layout.tick()
            layout.observe(torch.ones(len(VITALS), 2))
            layout.add_fault(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert float(layout.alpha[0]) == pytest.approx(0.8, abs=1e-4)
    assert int(layout.faults[1]) == 800
    assert layout.vitals.eq(1).all()


def test_only_one_of_many_threads_wins_a_move() -> None:
    layout, won, ready = KasminaStateLayout(1), [], threading.Barrier(8)

    def claim(number: int) -> None:
        ready.wait()
        try:
            layout.move(0, Stage.DORMANT, Stage.GERMINATED, number)
            won.append(number)
        except TransitionError:
            pass

    threads = [threading.Thread(target=claim, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [int(layout.changed[0])]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda layout: pickle.loads(pickle.dumps(layout))])
def test_a_copy_has_the_state_and_a_lock_of_its_own(how: object) -> None:
    layout = KasminaStateLayout(2)
    layout.move(0, Stage.DORMANT, Stage.GERMINATED, 7)
    copied = how(layout)  # type: ignore[operator]
    assert copied.lock is not layout.lock
    copied.move(0, Stage.GERMINATED, Stage.TRAINING, 8)
    assert (layout.stage_of(0), copied.stage_of(0)) == (Stage.GERMINATED, Stage.TRAINING)


def test_alpha_keeps_its_precision_when_the_model_is_cast() -> None:
    layout = KasminaStateLayout(2).to(torch.bfloat16).double()
    assert (layout.alpha.dtype, layout.stage.dtype, layout.changed.dtype) == (
        torch.float32,
        torch.uint8,
        torch.int64,
    )
