"""A part of the bad seeds' bench: each kind turns bad in real runs, none is kept, each way back is exact."""

from __future__ import annotations

import pytest

from benchmarks.bad_kernels import KINDS
from benchmarks.bad_runs import HOSTS, Run
from benchmarks.bad_seeds import Answer, Job, promises, run, stopped


def test_what_stopped_a_seed_is_read_from_its_reason() -> None:
    assert stopped("rolled back to step 3: harm: the held-out loss is 2 ± 1 above it") == "governor: harm"
    assert stopped("the run ended; no held-out gain") == "last gate"
    assert stopped("no gain on held-out examples") == "gate"


def test_a_twin_has_the_same_bits_until_a_seed_is_exposed() -> None:
    one = Run(HOSTS["dropout"], 3, governed=True, few=False)
    assert one.until("race")
    digest = one.digest()
    twin = Run(HOSTS["dropout"], 3, governed=False, few=False, grows=False)
    while twin.growth.steps < one.growth.steps:
        twin.step()
    assert twin.digest() == digest
    twin.step()
    assert twin.digest() != digest


def test_what_was_not_injected_is_not_judged() -> None:
    missing = Answer("NaN", "winner", "", True, False, False, "", "", None, 0, 0, None, None, None)
    assert not any(promise.kept for promise in promises([missing]) if promise.text != "kept")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_none_is_kept(kind: str) -> None:
    early = {how for how, (where, _) in KINDS[kind].items() if where == "finish"}
    answers = [run(Job(kind, number)) for number in range(3) if [*KINDS[kind]][number] not in early]
    assert all(answer.injected and not answer.kept for answer in answers)
    assert all(answer.exact == answer.rollbacks for answer in answers)
    assert all(answer.untouched is not False for answer in answers)
