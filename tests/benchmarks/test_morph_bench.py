"""The morph bench times what it says, and runs in its smoke form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import morph
from esper.contracts import Stage


@pytest.mark.parametrize("subject", morph.SUBJECTS, ids=lambda one: one.name)
def test_a_seed_wakes_sleeps_and_leaves_the_host_as_it_was(subject: morph.Subject) -> None:
    bed = morph.Bed.made(subject)
    classes = [type(module) for module in bed.model.host.modules()]
    layer = bed.wake(subject.pair)
    assert layer.kernel is not None
    assert bed.model.layout.stage_of(bed.model.seeds(subject.pair)[0]) is Stage.TRAINING
    assert [type(module) for module in bed.model.host.modules()] != classes
    bed.sleep(subject.pair)
    assert [type(module) for module in bed.model.host.modules()] == classes
    assert not bed.model.layout.stage.any()


def test_a_widening_is_timed_on_a_host_that_really_grows() -> None:
    bed, watch = morph.Bed.made(morph.SUBJECTS[0]), morph.Stopwatch()
    before = bed.model.parameter_count()
    morph.widening(bed, watch)
    assert bed.model.parameter_count() > before
    assert all(value > 0 for values in watch.rows.values() for value in values)
    grafted = morph.Bed.made(morph.SUBJECTS[0], "low_rank")
    morph.grafting(grafted, watch)
    assert {"graft: kernel becomes a branch", "merge: kernel folded into its layer"} <= watch.rows.keys()


def test_dispatch_compares_the_same_layer_awake_and_bare() -> None:
    echo = morph.Echo()
    x = torch.randn(3)
    assert torch.equal(echo(x), x)
    rows = morph.dispatch(2)
    assert {len(values) for values in rows.values()} == {2}


def test_a_quick_run_writes_and_judges_nothing(tmp_path: Path) -> None:
    assert morph.main(["--quick", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "morph.json").read_text())
    assert set(record["medians"]) == {"MLP", "CNN", "transformer", "one site"}
    timed = {row for by in record["medians"].values() for row in by}
    assert timed == set(record["meaning"])
