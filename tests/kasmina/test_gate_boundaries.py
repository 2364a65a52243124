"""Where the gate's answer turns: exact numbers at every limit, what is read, and what a value is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import esper
from esper.config import Gate as Settings
from esper.errors import ProbeError
from esper.kasmina.evidence.e_values import e_value, weight_of_evidence
from esper.kasmina.evidence.significance import p_value
from esper.kasmina.race.gate import Gate, Verdict, bounded, check_probe
from esper.kasmina.race.worth import ALONE_EACH, Worth
from esper.kasmina.widths.widen import WidenKernel

Batch = tuple[Tensor, Tensor]
BLOCKS, WHOLE = Worth(alone=False, cut=True), Worth(alone=False)


def squared(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


class Exact:
    """A host that gives zero and a kernel that gives its input: every loss is a square one can see."""

    def __init__(
        self, probe: Any, looks: int = 4, worth: Worth = ALONE_EACH, loss: Any = squared, **settings: Any
    ) -> None:
        self.host = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
        for parameter in self.host.parameters():
            nn.init.zeros_(parameter)
        wrapped = esper.wrap(self.host, torch.ones(4, 1))
        self.layer = wrapped.layer("0>2", print)
        self.kernel = WidenKernel(wrapped.pairs["0>2"], 1)
        for name, parameter in self.kernel.named_parameters():
            nn.init.constant_(parameter, 0.0 if "bias" in name else 1.0)
        self.told: list[tuple[str, str]] = []
        self.gate = Gate(
            self.host,
            loss,
            probe,
            Settings(**settings),
            looks,
            lambda *why: self.told.append(why),
            worth=worth,
        )

    def look(self, *train: Batch) -> Verdict:
        return self.gate.look(self.layer, self.kernel, train or [noisy(32, 1.0)], seed=3)

    def differences(self, batches: Any) -> np.ndarray:
        return self.gate.differences(self.layer, self.kernel, batches, seed=3)[0]


def exactly(x: float, y: float, examples: int = 32) -> Batch:
    return torch.full((examples, 1), x), torch.full((examples, 1), y)


def noisy(examples: int, noise: float, target: float = 1.0) -> Batch:
    x = torch.rand(examples, 1) + 0.5
    return x, target * x + noise * torch.randn(examples, 1)


# -- the limits of the answer --


@pytest.mark.parametrize(
    ("x", "y", "min_gain", "reason"),
    [
        (0.0, 2.0, 0.0, "no gain on held-out examples"),  # 4 − 4
        (1.0, 0.5, 0.0, "no gain on held-out examples"),  # .25 − .25, of another sign
        (1.0, 2.0, 0.8, "the gain is below 80.0% of the held-out loss"),  # 4 − 1 < .8 · 4
        (
            1.0,
            2.0,
            0.75,
            "the held-out gain may be chance",
        ),  # 3 = .75 · 4 is not below; all equal tell nothing
        (0.5, 0.5, 0.0, "the held-out gain may be chance"),  # .25 is a gain too
    ],
)
def test_a_gain_is_refused_below_its_limits_and_not_at_them(
    x: float, y: float, min_gain: float, reason: str
) -> None:
    case = Exact([exactly(x, y) for _ in range(4)], min_gain=min_gain)
    verdict = case.look()
    assert (verdict.passed, verdict.reason) == (False, reason)
    assert verdict.gain == y**2 - (y - x) ** 2
    assert (verdict.loss, verdict.examples) == (y**2, 128)


def test_the_share_is_of_the_size_of_a_loss_below_nought() -> None:
    case = Exact([exactly(1.0, 2.0)] * 4, loss=lambda m, b: squared(m, b) - 8, min_gain=0.5)
    verdict = case.look()  # from −4 to −7
    assert (verdict.gain, verdict.loss) == (3.0, -4.0)
    assert verdict.reason == "the held-out gain may be chance"
    case.gate.settings = Settings(min_gain=0.8)
    assert case.look().reason == "the gain is below 80.0% of the held-out loss"


def test_evidence_that_weighs_what_is_asked_for_passes_and_a_hair_less_does_not() -> None:
    case, train = Exact([noisy(32, 0.3) for _ in range(4)], false_keep=0.5), noisy(32, 0.3)
    weight = case.look(train).e_value
    assert weight > 8
    case.gate.allowed = weight / 2  # type: ignore[assignment]
    at = case.look(train)
    assert (at.passed, at.threshold, at.e_value) == (True, weight, weight)
    assert at.reason == "held-out evidence"
    case.gate.allowed = math.nextafter(weight, math.inf) / 2  # type: ignore[assignment]
    below = case.look(train)
    assert (below.passed, below.reason) == (False, "the held-out gain may be chance")


@pytest.mark.parametrize("worth", [ALONE_EACH, WHOLE])
@pytest.mark.parametrize("looks", [1, 4, 30])
def test_the_fewest_are_as_many_nearly_equal_gains_as_could_pass(worth: Worth, looks: int) -> None:
    gate = Exact([], looks, worth, false_keep=0.05).gate
    assert gate.threshold == looks / 0.05

    def passes(n: int) -> bool:
        p = p_value(1 + 1e-9 * np.arange(n), blocks=None if worth.alone else n)
        return p is not None and p <= 0.05 / looks

    assert gate.fewest == next(n for n in range(8, 1000) if passes(n))


@pytest.mark.parametrize(("more", "reason"), [(-1, "too few"), (0, "may be chance"), (1, "may be chance")])
def test_too_few_to_tell_is_told_from_chance(more: int, reason: str) -> None:
    fewest = Exact([]).gate.fewest
    given = fewest + more
    verdict = Exact([exactly(1.0, 2.0, given)]).look()
    told = {
        "too few": f"{given} held-out examples are too few to tell; {fewest} could pass",
        "may be chance": "the held-out gain may be chance",
    }
    assert (verdict.passed, verdict.reason) == (False, told[reason])


def test_a_spent_budget_answers_without_a_look() -> None:
    case = Exact([noisy(32, 0.3)], looks=1)
    assert case.look().look == 1
    reason = "every look of the false-keep budget is spent"
    assert case.look() == Verdict(False, 1, 0.0, math.inf, None, None, 0, reason)


# -- what stakes are taken from --


@pytest.mark.parametrize("worth", [ALONE_EACH, WHOLE])
def test_stakes_come_from_the_last_batch_or_where_a_batch_is_one_value_from_all(worth: Worth) -> None:
    torch.manual_seed(0)
    size = 96 if worth.alone else 4
    probe = [noisy(size, 0.2) for _ in range(1 if worth.alone else 96)]
    train = [noisy(8, 9.0), noisy(16, 6.0), noisy(32, 4.0)]
    case = Exact(probe, worth=worth)
    held, rehearsal = case.differences(probe), case.differences(train[2:] if worth.alone else train)
    assert (len(held), len(rehearsal)) == (96, 32 if worth.alone else 3)
    weight = weight_of_evidence(held, rehearsal, blocks=not worth.alone)
    assert weight == e_value(held, rehearsal), "the p-value does not hide what the stakes say"
    assert case.look(*train).e_value == weight
    assert case.gate.size == 32


def test_the_p_value_of_blocks_takes_each_as_independent() -> None:
    torch.manual_seed(0)
    probe, train = [noisy(16, 1.0) for _ in range(20)], [noisy(16, 0.1) for _ in range(6)]
    case = Exact(probe, worth=WHOLE)
    held, rehearsal = case.differences(probe), case.differences(train)
    as_examples = p_value(held)
    assert as_examples is not None
    assert weight_of_evidence(held, rehearsal) == 1 / as_examples
    assert 2 / as_examples < e_value(held, rehearsal) == case.look(*train).e_value


# -- what a value is --


def test_batches_are_cut_to_the_loops_size_only_where_they_may_be() -> None:
    batches = [exactly(1.0, 2.0, 32), exactly(1.0, 2.0, 8)]
    for worth, size, expected in (
        (BLOCKS, None, [32, 8]),  # as where a resumed run ends before any look
        (BLOCKS, 8, [8, 8, 8, 8, 8]),
        (WHOLE, 8, [32, 8]),
        (ALONE_EACH, 8, [32, 8]),
    ):
        gate = Exact(batches, worth=worth).gate
        assert gate.size is None
        gate.size = size
        assert [len(x) for x, _ in gate.parts(batches)] == expected


def test_a_value_is_an_example_or_a_block_or_what_the_user_says() -> None:
    x, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[2.0], [2.0], [2.0]])
    own = Worth(alone=True, per_example=lambda model, batch: batch[1].flatten() - model(batch[0]).flatten())
    for worth, found, without in (
        (ALONE_EACH, [3.0, 4.0, 3.0], [4.0, 4.0, 4.0]),  # 4 − (2 − x)²
        (WHOLE, [10 / 3], [4.0]),
        (own, [1.0, 2.0, 3.0], [2.0, 2.0, 2.0]),  # x
    ):
        case = Exact([], worth=worth)
        given = case.gate.differences(case.layer, case.kernel, [(x, y)], seed=3)
        for one, expected in zip(given, (found, without), strict=True):
            assert one.tolist() == pytest.approx(expected, rel=1e-6)
        assert case.told == []


def test_examples_run_one_by_one_are_told_of_once() -> None:
    def stubborn(model: nn.Module, batch: Any) -> Tensor:
        loss = squared(model, batch)
        return loss if loss.item() >= 0 else -loss

    case = Exact([exactly(1.0, 2.0, 4)] * 2, loss=stubborn)
    case.look()
    case.look()
    assert [what for what, _ in case.told] == ["evidence"]


# -- how far a probe is read --


class Endless:
    """A probe that does not say how much it has."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes

    def __iter__(self) -> Iterator[Batch]:
        return (exactly(1.0, 2.0, size) for size in self.sizes)


class Changed(Endless):
    """A probe whose batches are changed on their way; ``given`` is the user's."""

    def __init__(self, given: Any, *sizes: int) -> None:
        super().__init__(*sizes)
        self.given = given


@pytest.mark.parametrize(
    ("probe", "read"),
    [
        (Endless(2047, 1, 1), [2047, 1]),
        (Endless(2049, 1), [2049]),
        (Endless(1, 1), [1, 1]),
        ([exactly(1.0, 2.0, 2048)] * 2, [2048, 2048]),
        (Changed(Endless(), 2048, 1), [2048]),
        (Changed([0, 0], 2048, 1), [2048, 1]),
    ],
)
def test_a_probe_without_a_length_is_read_to_2048_examples(probe: Any, read: list[int]) -> None:
    assert [len(x) for x, _ in bounded(probe)] == read


class OneShot(IterableDataset):  # type: ignore[type-arg]
    def __init__(self, fresh: bool) -> None:
        self.fresh, self.rows = fresh, iter([exactly(1.0, 2.0, 1)])

    def __iter__(self) -> Iterator[Batch]:
        return iter([exactly(1.0, 2.0, 1)]) if self.fresh else self.rows


class Resetting:
    """Gives its one iterator, set back, as a loader whose workers persist does."""

    def __init__(self) -> None:
        self.rows = Rows()

    def __iter__(self) -> Rows:
        self.rows.left = 2
        return self.rows


class Rows(Iterator[Batch]):
    left = 0

    def __next__(self) -> Batch:
        if not self.left:
            raise StopIteration
        self.left -= 1
        return exactly(1.0, 2.0, 1)


def test_what_can_be_read_again_is_a_probe() -> None:
    data = TensorDataset(*exactly(1.0, 2.0, 4))
    for probe in ([exactly(1.0, 2.0)], DataLoader(data), DataLoader(OneShot(True)), Resetting()):
        check_probe(probe)


def test_a_data_set_that_can_be_read_once_is_no_probe() -> None:
    for probe in (OneShot(False), DataLoader(OneShot(False))):
        with pytest.raises(ProbeError, match="reads a one-shot OneShot: its __iter__ returns the same"):
            check_probe(probe)


def test_what_fails_while_read_says_how() -> None:
    class Broken(Endless):
        def __iter__(self) -> Iterator[Batch]:
            raise OSError("no such disk")

    with pytest.raises(ProbeError, match="the probe cannot be read: OSError: no such disk"):
        check_probe(Broken())
