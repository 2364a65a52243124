"""What a loss does to the batch it is handed, and probes that can never tell: kinds F, J and N11."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.batches.examples import count_examples
from esper.errors import ProbeError
from tests.cases.loops import Task, cross_entropy, narrow, run

RECIPES = ("early", "incubate")
Recipe = Literal["early", "incubate"]


def named(n: int = 48, seed: int = 1) -> dict[str, Tensor]:
    """Draw a batch by name."""
    x, y = Task(seed)(n)
    return {"x": x, "y": y}


def popping(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Take the labels out, as code around language models does."""
    labels = batch.pop("y")
    return F.cross_entropy(model(batch["x"]), labels)


def noting(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Put the logits in."""
    batch["logits"] = model(batch["x"])
    return F.cross_entropy(batch["logits"], batch["y"])


def scaling(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Scale the inputs where they are."""
    return F.cross_entropy(model(batch["x"].mul_(0.5)), batch["y"])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("loss", [popping, noting, scaling])
def test_held_out_batches_stay_what_they_are(loss: Any, recipe: Recipe) -> None:
    net, held = narrow(), named(256)
    inputs = held["x"].clone()

    def handed(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Leave the loop's own batch alone: the run is given it afterwards."""
        value: Tensor = loss(
            model, batch if len(batch["x"]) != 48 else {k: v.clone() for k, v in batch.items()}
        )
        return value

    task = Task()
    ran = run(
        net, handed, lambda n=48: dict(zip("xy", task(n), strict=True)), [held], steps=60, growth=recipe
    )
    assert held.keys() == {"x", "y"}
    assert torch.equal(held["x"], inputs)
    assert net[0].out_features > 1
    assert not [one for one in ran.warnings if "skipped" in one]


def rank_of_pairs(model: nn.Module, batch: Any) -> Tensor:
    """Return a loss that couples examples."""
    z = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(5 * z @ F.normalize(batch[0], dim=1).T, torch.arange(len(z)))


@pytest.mark.parametrize("loss", [rank_of_pairs, cross_entropy])
def test_a_race_that_no_evidence_can_win_is_not_run_and_named(loss: Any) -> None:
    net, few = narrow(), Task(7)(96 if loss is rank_of_pairs else 4)
    ran = run(net, loss, probe=[few], growth="incubate")
    (told,) = ran.warnings
    values = "2 held-out batches, whose examples the loss couples" if loss is rank_of_pairs else "4 held-out"
    assert f"the probe has {values}" in told
    assert "nothing can pass: hold out more" in told
    assert ran.growth.cost.growth_flops == 0
    assert not ran.outcomes()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_probe_without_numbers_is_refused_by_either_recipe(recipe: Recipe) -> None:
    x, y = Task(7)(128)
    x[100] = torch.nan
    with pytest.raises(ProbeError, match="the loss of batch 1 of the probe is nan"):
        run(narrow(), probe=[(x[:64], y[:64]), (x[64:], y[64:])], growth=recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_table_is_one_batch_and_no_probe(recipe: Recipe) -> None:
    table = Task(7)(64)[0]
    for probe in (table, table.numpy()):
        with pytest.raises(ProbeError, match="looks like one batch"):
            run(narrow(), lambda m, b: m(torch.as_tensor(b)).square().mean(), probe=probe, growth=recipe)


class Picture:
    """An image as image libraries have them."""

    def __init__(self, pixels: Any) -> None:
        self.pixels = pixels


def pairs(x: Tensor, y: Tensor) -> Any:
    """Collect examples as pairs."""
    return [(one, int(label)) for one, label in zip(x, y, strict=True)]


def mappings(x: Tensor, y: Tensor) -> Any:
    """Collect examples by name."""
    return [{"x": one, "y": label} for one, label in zip(x, y, strict=True)]


def pictures(x: Tensor, y: Tensor) -> Any:
    """Keep images as objects beside their labels."""
    return [Picture(one.numpy()) for one in x], y


READ: dict[Any, Any] = {
    pairs: lambda b: (torch.stack([x for x, _ in b]), torch.tensor([y for _, y in b])),
    mappings: lambda b: (torch.stack([one["x"] for one in b]), torch.stack([one["y"] for one in b])),
    pictures: lambda b: (torch.stack([torch.from_numpy(one.pixels) for one in b[0]]), b[1]),
}


@pytest.mark.parametrize("made", list(READ))
def test_examples_as_they_were_collected_count_one_by_one(made: Any) -> None:
    task, plain, net, twin = Task(), Task(), narrow(), narrow()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        """Collate, and return the usual loss."""
        return cross_entropy(model, READ[made](batch))

    ran = run(net, loss, lambda n=48: made(*task(n)), [made(*Task(7)(200))], steps=40, growth="early")
    run(twin, cross_entropy, plain, [Task(7)(200)], steps=40, growth="early")
    assert count_examples(made(*Task()(9))) == 9
    assert net[0].out_features > 1
    assert torch.equal(net[0].weight, twin[0].weight), "the same as tensors"
    assert not ran.warnings


def test_a_list_of_batches_is_no_list_of_examples() -> None:
    tasks = [Task(seed)(12) for seed in range(6)]
    assert count_examples(tasks) == 12
    assert count_examples([{"x": x, "y": y} for x, y in tasks]) == 12
