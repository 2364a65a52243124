import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import esper as library
from esper.cli import comparison, digits
from esper.nissa.run.history import fold
from esper.nissa.run.journal import read_events
from esper.nissa.views.report import write_report


@pytest.fixture(scope="module")
def data() -> digits.Digits:
    return digits.Digits.split(seed=0)


def test_no_digit_is_used_twice(data: digits.Digits) -> None:
    parts = [data.train[0], torch.cat([x for x, _ in data.probe]), data.test[0]]
    assert [len(part) for part in parts] == [1077, 270, 450]
    assert len(torch.cat(parts).unique(dim=0)) == len(digits.load_digits().data)


@pytest.mark.parametrize("task", digits.TASKS, ids=lambda task: task.name)
def test_a_task_is_grown_and_compared(task: digits.Task, data: digits.Digits, tmp_path: Path) -> None:
    result = comparison.compare(replace(task, epochs=8), data, tmp_path, seed=0, plain=True)
    rows = result["rows"]
    grown, twin = fold(read_events(tmp_path)), fold(read_events(tmp_path / "no-growth"))
    assert rows[0]["parameters"] == grown.totals["parameters_after"]
    assert rows[0]["flops"] == grown.totals["training_flops"] + grown.totals["growth_flops"]
    assert rows[1]["parameters"] == twin.totals["parameters_before"] == grown.totals["parameters_before"]
    assert grown.totals["steps"] == twin.totals["steps"] == 8 * data.steps
    assert twin.totals["flops_before"] == grown.totals["flops_before"]  # both count alike
    if grown.totals["kept"]:
        assert rows[2]["parameters"] == rows[0]["parameters"]
        assert rows[2]["flops"] > rows[1]["flops"]
    net = library.load_into(task.host(task.small), tmp_path / "model")
    assert data.accuracy(net) == rows[0]["accuracy"]
    page = write_report(tmp_path).read_text()
    assert "Was it worth it?" in page
    assert rows[1]["name"] in page
    assert json.loads((tmp_path / "comparison.json").read_text()) == rows


def test_a_twin_that_does_not_grow_learns_like_a_plain_loop(data: digits.Digits, tmp_path: Path) -> None:
    task = replace(digits.TASKS[0], epochs=2)
    row = digits.train_fixed(task, (2,), data, tmp_path, seed=0, watch=lambda event: None)
    net, optimizer = task.build((2,), 0), None
    optimizer = torch.optim.Adam(net.parameters(), lr=task.rate)
    order = torch.Generator().manual_seed(0)
    for _ in range(2):
        for batch in data.batches(order):
            optimizer.zero_grad()
            digits.loss_fn(net, batch).backward()
            optimizer.step()
    assert data.accuracy(net) == row["accuracy"]
    assert row["flops"] == 3 * 2 * (64 * 2 + 2 * 10) * 2 * len(data.train[1])  # 2 per multiply-add, 2 epochs


@pytest.mark.slow
def test_the_whole_demo_as_a_user_runs_it(esper, tmp_path: Path) -> None:
    ran = esper("demo")
    assert ran.returncode == 0, ran.stderr
    for name in ("mlp", "cnn"):
        assert f"report: runs/demo/{name}/report.html" in ran.stdout
        assert (tmp_path / "runs" / "demo" / name / "report.html").exists()
    assert "held-out gain" in ran.stdout
    told = json.loads(esper("demo", "--json", "--run-dir", tmp_path / "again").stdout)
    assert told["mlp"]["rows"][0]["accuracy"] > told["mlp"]["rows"][1]["accuracy"]  # growth helped
