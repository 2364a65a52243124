"""The harness judges, writes and exits as it says; every bench runs in its smoke form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import cli_start, compare, digits, harness, student_teacher
from benchmarks.promises import Promise
from benchmarks.runs import Job, run
from benchmarks.tasks import TASKS
from benchmarks.workers import workers


@pytest.mark.parametrize(
    ("measured", "relation", "bound", "kept"),
    [
        (0.006, "<=", 0.006, True),
        (0.0061, "<=", 0.006, False),
        (0.0, ">", 0.0, False),
        (1.0, "<", 2.0, True),
        (-0.003, ">=", -0.003, True),
        (None, "<=", 1.0, False),
        (0.1, "<", None, False),
        (float("nan"), "<=", 1.0, False),
    ],
)
def test_a_promise_is_kept_only_by_a_measured_figure(measured, relation, bound, kept) -> None:
    assert Promise("p", measured, relation, bound).kept is kept


@pytest.mark.parametrize(("measured", "code"), [(0.3, 0), (0.5, 1), (None, 1)])
def test_the_exit_code_and_the_file_tell_a_miss(tmp_path: Path, capsys, measured, code) -> None:
    chosen = harness.options("x", "doc", ["--out", str(tmp_path), "--json"], seeds=3)
    assert harness.conclude("x", chosen, [], [Promise("p", measured, "<=", 0.4)], {"rate": 0.1}) == code
    record = json.loads((tmp_path / "x.json").read_text())
    assert json.loads(capsys.readouterr().out) == record
    assert record["promises"][0]["kept"] is (code == 0)
    assert record["seeds"] == 3
    assert {"cpu", "cores", "torch", "threads_per_worker"} <= record["machine"].keys()


def test_a_bad_command_line_is_refused(capsys) -> None:
    for line in (["--seeds", "0"], ["--jobs", "-1"], ["--speed"], ["--arms", "fixd"]):
        with pytest.raises(SystemExit) as refusal:
            harness.options("x", None, line, seeds=3, arms=("fixed", "grown"))
        assert refusal.value.code == 2
    assert "no arm fixd; known: fixed, grown" in capsys.readouterr().err
    chosen = harness.options("x", None, ["--arms", "grown"], seeds=3, arms=("fixed", "grown"))
    assert chosen.select(("fixed", "grown")) == ["grown"]


def test_rates_are_chosen_on_the_probe_not_on_the_reported_figure() -> None:
    task = TASKS["student-teacher"]
    one = run(Job("student-teacher", "fixed:small", 0, 0.1, epochs=1))
    grid = {
        ("a", 0.1): [vary(one, rate=0.1, probe=0.2, train=0.0, test=0.0)],
        ("a", 0.3): [vary(one, rate=0.3, probe=0.1, train=9.0, test=9.0)],
        ("a", 1.0): [vary(one, rate=1.0, probe=float("nan"), train=0.0, test=0.0)],
    }
    assert compare.choose_rates(grid, task) == {"a": 0.3}
    assert compare.choose_rates(grid, TASKS["digits-mlp"]) == {"a": 0.1}


def test_arms_of_other_seeds_are_not_paired() -> None:
    one = run(Job("student-teacher", "fixed:small", 0, 0.1, epochs=1))
    with pytest.raises(ValueError, match="same seeds"):
        compare.paired([one], [vary(one, seed=1)], "test")


def test_workers_answer_in_order_as_this_process_does() -> None:
    jobs = [Job("student-teacher", "fixed", seed, 0.1, epochs=20) for seed in range(3)]
    with workers(0) as here:
        alone = here.map(run, jobs, "")
    with workers(2) as pool:
        answers = pool.map(run, jobs, "")
        with pytest.raises(KeyError):
            pool.map(run, [Job("no such task", "fixed", 0, 0.1)], "")
    assert [answer.seed for answer in answers] == [0, 1, 2]
    assert [answer.train for answer in answers] == [answer.train for answer in alone]


@pytest.mark.parametrize(
    ("bench", "line", "name"),
    [
        (student_teacher, ["--arms", "fixed:small,fixed,gradmax"], "student-teacher"),
        (digits, ["--arms", "fixed:small,fixed"], "digits"),
        (cli_start, ["--seeds", "1"], "cli-start"),
    ],
)
def test_a_quick_run_prints_writes_and_judges_nothing(bench, line, name, tmp_path: Path, capsys) -> None:
    assert bench.main([*line, "--quick", "--jobs", "0", "--out", str(tmp_path)]) == 0
    assert "a quick run judges nothing" in capsys.readouterr().out
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["bench"] == name
    if name == "digits":
        assert (tmp_path / "digits-mlp.png").stat().st_size > 5000
        assert (tmp_path / "digits-cnn.svg").read_text().lstrip().startswith("<?xml")


def vary(result, **changes):
    return type(result)(**{**vars(result), **changes})
