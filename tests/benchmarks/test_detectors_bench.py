"""The detectors' bench counts as it says, and its labelled runs hold what their labels say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import detectors
from benchmarks.detector_runs import FAULTS, SCENARIOS, spoil_batch, spoil_gradients
from benchmarks.detectors import Answer, Job, false_alarms, promises, recall, run

ANSWER = Answer("digits-mlp adam 64", 0, None, 1000, None, (), None, None, True, 0)


def test_recall_counts_what_was_found_in_time() -> None:
    assert recall([0, 3, 4, None]) == 0.5
    assert recall([0, 3, 4, None], within=5) == 0.75
    assert recall([]) is None


def test_false_alarms_are_per_thousand_healthy_steps() -> None:
    assert false_alarms([ANSWER, replace(ANSWER, steps=3000, false=("one", "two"))]) == 0.5


def test_what_was_not_measured_is_not_kept() -> None:
    judged = {promise.text: promise.kept for promise in promises([ANSWER], [{"share": 0.0, "step_ms": 1.0}])}
    assert judged["false alarms per 1,000 healthy steps"]
    assert not judged["cost of a step of 10 ms or more"]
    assert not judged["gradient ×1000: found within 3 steps"]


def test_faults_are_what_their_names_say() -> None:
    x, y, labels = torch.ones(8, 3), torch.zeros(8), torch.arange(100.0)
    generator = torch.Generator().manual_seed(0)
    assert spoil_batch("NaN in the batch", True, True, (x, y), labels, generator)[0].isnan().sum() == 1
    assert spoil_batch("NaN in the batch", False, True, (x, y), labels, generator)[0].isfinite().all()
    assert x.isfinite().all()
    assert spoil_batch("label noise", False, True, (x, y), labels, generator)[1].unique().numel() > 4
    assert spoil_batch("label noise", False, False, (x, y), labels, generator)[1] is y
    net = nn.Linear(3, 1)
    net(x).sum().backward()
    before = net.weight.grad.clone()
    spoil_gradients("gradient ×1000", True, net)
    assert torch.equal(net.weight.grad, before * 1000)


@pytest.mark.parametrize("fault", [None, FAULTS[0], FAULTS[2]])
def test_a_run_answers_the_same_twice(fault: str | None) -> None:
    job = Job("cancer-mlp adam 4", 3, fault, quick=True)
    answer = run(job)
    assert run(job) == answer
    assert answer.false == ()
    assert (answer.delay == 0) is (fault is not None)


def test_a_growing_run_is_healthy_for_a_while() -> None:
    healthy(["digits-mlp grows adam 64"])


@pytest.mark.slow
def test_every_scenario_is_healthy_for_a_while() -> None:
    healthy(list(SCENARIOS))


def healthy(names: list[str]) -> None:
    grown = 0
    for name in names:
        answer = run(Job(name, 7, None, quick=True))
        assert answer.false == (), name
        assert answer.steps == 200
        grown += answer.grown
    assert grown


@pytest.mark.slow
def test_the_quick_form_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert detectors.main(["--quick", "--jobs", "0", "--json", "--out", str(tmp_path)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["recall"][FAULTS[0]] == 1.0
