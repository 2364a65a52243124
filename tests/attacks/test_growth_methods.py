"""N11, A8: what the methods of a run are called with is checked; a call that is refused changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import esper
from esper.errors import ConfigError, EsperError, ProbeError, SiteError, StateError
from tests.cases.loops import Task, cross_entropy, narrow

BESIDES: list[Any] = [
    0, 1.5, float("nan"), True, b"x", [], ["0>2"], {}, {1: 2}, set(), object(), torch.tensor(3.0), int,
]  # fmt: skip
CALLS: dict[str, tuple[Callable[[esper.Growth, Any], object], type[EsperError], list[Any]]] = {
    "grow_now": (
        lambda g, v: g.grow_now(v),
        SiteError,
        [*BESIDES, None, "", "0", "x" * 9000, "\x1b[31m", "\ud800"],
    ),
    "epoch": (lambda g, v: g.epoch(v), ConfigError, [*(v for v in BESIDES if v), "x", [1.0]]),
    "epoch, a metric": (
        lambda g, v: g.epoch({"loss": v}),
        ConfigError,
        ["x", "1", None, [], {}, 1j, 10**400, object(), torch.zeros(2), b"1"],
    ),
    "expect": (lambda g, v: g.expect(v), ConfigError, [*BESIDES, None]),
    "expect, steps": (
        lambda g, v: g.expect("other data", v),
        ConfigError,
        [*BESIDES, -1, "3", 10**30],
    ),
    "load_state_dict": (
        lambda g, v: g.load_state_dict(v),
        StateError,
        [
            *BESIDES,
            None,
            "x",
            *({"version": 2, **more} for more in ({}, {"sites": 3}, {"sites": {"0>2": 1}})),
        ],
    ),
}
CASES = [(name, number) for name, (_, _, values) in CALLS.items() for number in range(len(values))]


@pytest.fixture(scope="module")
def growth() -> Iterator[esper.Growth]:
    net = narrow()
    made = esper.grow(
        net, torch.optim.Adam(net.parameters()), cross_entropy, probe=[Task()(64)], steps=100, growth="early",
        config={"governor": {"enabled": True}},
    )  # fmt: skip
    yield made
    made.finish()


@pytest.mark.parametrize(("name", "number"), CASES)
def test_what_does_not_fit_is_refused_and_nothing_is_noted(
    growth: esper.Growth, name: str, number: int
) -> None:
    call, kind, values = CALLS[name]
    run = growth.run
    before = run.asked, run.parts.epochs, dict(run.metrics), run.steps, len(run.plans)
    with pytest.raises(kind) as caught:
        call(growth, values[number])
    assert (run.asked, run.parts.epochs, dict(run.metrics), run.steps, len(run.plans)) == before
    assert len(str(caught.value)) < 2000
    assert all(one.isprintable() or one == "\n" for one in str(caught.value))


@pytest.mark.parametrize("given", [None, {}, {"loss": 1}, {"loss": torch.tensor(0.5)}, {"a": float("nan")}])
def test_what_fits_is_noted(growth: esper.Growth, given: Any) -> None:
    epochs = growth.run.parts.epochs
    growth.epoch(given)
    assert growth.run.parts.epochs == epochs + 1


def whole_numbers() -> list[tuple[str, str]]:
    config = esper.Config()
    return [
        (section, name)
        for section in type(config).model_fields
        for name, field in getattr(type(getattr(config, section)), "model_fields", {}).items()
        if "int" in str(field.annotation)
    ]


@pytest.mark.parametrize(("section", "name"), whole_numbers())
def test_no_setting_counts_further_than_a_machine(section: str, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        esper.Config(**{section: {name: 10**30}})


def endless() -> list[Any]:
    batch: list[Any] = [torch.zeros(8, 10)]
    batch.append(batch)
    return batch


def test_a_batch_that_holds_itself_is_refused() -> None:
    net = narrow()
    optimizer = torch.optim.Adam(net.parameters())

    def loss_fn(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return model(batch[0]).square().mean()

    with pytest.raises(ProbeError, match="nested in itself"):
        esper.grow(net, optimizer, loss_fn, probe=[endless()], steps=100)
    esper.grow(net, optimizer, loss_fn, probe=[endless()[:1]], steps=100).finish()
