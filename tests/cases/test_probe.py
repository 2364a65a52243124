"""Probes that say nothing, in part or in order: what is read, what is left out, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.errors import ProbeError
from esper.tolaria.growth.evidence.evidence import UNTOLD
from esper.tolaria.growth.evidence.held import held_batches, strata, thinned
from tests.cases.loops import Task, cross_entropy, narrow, run

Batch = tuple[Tensor, Tensor]


def asked(net: nn.Module, loss: Any, probe: Any) -> tuple[bool | None, list[str]]:
    """Begin a run; returns whether examples count alone, and what was warned of."""
    growth = esper.grow(net, torch.optim.Adam(net.parameters()), loss, probe=probe, steps=60)
    assert growth.loop.early is not None
    return growth.loop.early.evidence.independent, growth.run.parts.warnings


def batches(count: int, size: int = 50) -> list[Batch]:
    """Draw a probe."""
    draw = Task()
    return [draw(size) for _ in range(count)]


# -- what a loss says of an example ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_a_loss_of_the_hardest_half_couples_examples(seed: int) -> None:
    def hardest(model: nn.Module, batch: Any) -> Tensor:
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return losses.topk(len(losses) // 2)[0].mean()

    independent, warned = asked(narrow(seed), hardest, batches(4))
    assert independent is False
    assert "whose examples the loss couples" in warned[0]


class Routed(nn.Module):
    """Gives every example to one expert."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(10, 2)
        self.experts = nn.ModuleList(narrow(i) for i in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        share, which = self.gate(x).softmax(-1).max(-1)
        out = x.new_zeros(len(x), 10)
        for i, expert in enumerate(self.experts):
            out[which == i] = expert(x[which == i]) * share[which == i, None]
        return out


class Padded(nn.Module):
    """Reads a list of sequences of unlike length."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, xs: list[Tensor]) -> Tensor:
        """Return logits."""
        y: Tensor = self.b(torch.relu(self.a(pad_sequence(xs, batch_first=True)))).sum(1)
        return y


def sequences(n: int = 40, lengths: int = 40) -> tuple[list[Tensor], Tensor]:
    """Draw sequences of unlike length; by default no two are of one, nor are any two parts as filled up."""
    return [torch.randn(2 + i % lengths, 4) for i in range(n)], torch.randint(0, 2, (n,))


UNKNOWN: dict[str, tuple[Any, Any, Any]] = {
    "routed": (Routed, cross_entropy, lambda: batches(4)),
    "ragged": (Padded, cross_entropy, lambda: [sequences() for _ in range(4)]),
    "one by one": (narrow, cross_entropy, lambda: batches(4, 1)),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_told_is_not_called_coupled(name: str) -> None:
    make, loss, probe = UNKNOWN[name]
    independent, warned = asked(make(), loss, probe())
    assert independent is None
    assert UNTOLD in warned[0]
    assert "couples their examples cannot be told" in warned[0]


def test_a_probe_that_suffices_says_that_its_batches_are_the_values() -> None:
    _, warned = asked(narrow(), cross_entropy, batches(300, 1))
    assert any("each one value" in one for one in warned)


def test_the_first_batch_that_tells_is_believed() -> None:
    alone = Task()(2)
    independent, warned = asked(narrow(), cross_entropy, [alone, *batches(6)])
    assert independent is True
    assert not warned


# -- batches that are no evidence ------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 3])
def test_a_batch_whose_targets_are_all_ignored_is_left_out_and_named(at: int) -> None:
    nets = narrow(), narrow()
    probe = batches(6)
    void = (probe[0][0], torch.full((50,), -100))
    run(nets[0], probe=probe)
    ran = run(nets[1], probe=[*probe[:at], void, *probe[at:]])
    (warning,) = ran.warnings
    assert f"batch {at} is left out" in warning
    assert nets[0][0].out_features > 1
    for own, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(own, other)


def test_a_probe_of_ignored_targets_alone_is_refused() -> None:
    x, y = Task()(50)
    with pytest.raises(ProbeError, match="no target of the probe counts"):
        asked(narrow(), cross_entropy, [(x, torch.full_like(y, -100))])


@pytest.mark.parametrize("at", [0, 2])
def test_a_batch_whose_loss_is_not_finite_is_named(at: int) -> None:
    probe = batches(5)
    probe[at] = (probe[at][0] * float("nan"), probe[at][1])
    with pytest.raises(ProbeError, match=f"the loss of batch {at} of the probe is nan"):
        asked(narrow(), cross_entropy, probe)


# -- which examples are read -----------------------------------------------------------------------------


def in_order(count: int) -> tuple[Tensor, Tensor]:
    """Draw examples sorted by class."""
    x, y = Task()(count)
    order = y.argsort(stable=True)
    return x[order], y[order]


class Sized:
    """Batches that can only be read in order."""

    def __init__(self, probe: list[Batch]) -> None:
        self.probe = probe
        self.read = 0

    def __len__(self) -> int:
        """Count the batches."""
        return len(self.probe)

    def __iter__(self) -> Iterator[Batch]:
        """Read them."""
        for batch in self.probe:
            self.read += 1
            yield batch


def sorted_probe(kind: str, size: int = 100) -> Any:
    """Make a probe of 4,000 examples that is sorted by class."""
    x, y = in_order(4000)
    cut = [(x[i : i + size], y[i : i + size]) for i in range(0, 4000, size)]
    return {"list": cut, "sized": Sized(cut), "one batch": [(x, y)]}.get(
        kind, DataLoader(TensorDataset(x, y), size)
    )


@pytest.mark.parametrize("kind", ["list", "sized", "loader"])
@pytest.mark.parametrize("most", [256, 1024])
def test_a_sorted_probe_is_read_all_over(kind: str, most: int) -> None:
    probe = sorted_probe(kind)
    read, again = (held_batches(probe, most, 5, alone=True)[0] for _ in range(2))
    assert all(torch.equal(one[1][0], other[1][0]) for one, other in zip(read, again, strict=True))
    shares = torch.cat([batch[1] for _, batch in read]).bincount(minlength=10)
    assert shares.sum() == most
    assert shares.min() > most / 20
    if isinstance(probe, Sized):
        assert probe.read <= 2 * 41, "once, and a look at the first"


@pytest.mark.parametrize("kind", ["list", "sized", "loader"])
def test_batches_whose_examples_are_coupled_stay_whole(kind: str) -> None:
    probe = sorted_probe(kind)
    read = held_batches(probe, 1024, 5, alone=False)[0]
    whole = [one[0] for one in probe]
    assert len(read) == 11
    assert all(any(torch.equal(one, batch[0]) for one in whole) for _, batch in read)
    assert len({int(batch[1][0]) for _, batch in read}) > 6


def test_a_large_batch_is_thinned_all_over() -> None:
    probe = sorted_probe("one batch")
    (few,) = thinned([batch for _, batch in held_batches(probe, 1024, 0, True)[0]], 1024, 0)
    assert len(few[0]) == 1024
    shares = few[1].bincount(minlength=10).float() / 1024
    assert (shares - probe[0][1].bincount(minlength=10) / 4000).abs().max() < 0.01


def test_a_small_probe_is_read_whole_and_a_shuffled_one_from_its_beginning() -> None:
    probe = batches(6)
    read = held_batches(probe, 1024, 0, True)[0]
    assert [index for index, _ in read] == list(range(6))
    assert thinned(probe, 1024, 0)[2] is probe[2]
    x, y = in_order(4000)
    shuffled = DataLoader(TensorDataset(x, y), 100, shuffle=True)
    assert [index for index, _ in held_batches(shuffled, 1024, 0, True)[0]] == list(range(11))
    assert strata(10, 10, 0) == list(range(10))


def test_a_run_on_a_sorted_probe_sees_its_loss() -> None:
    net = narrow()
    ran = run(net, probe=sorted_probe("list"))
    assert ran.growth.loop.early is not None
    (told,) = [record.held_out for record in ran.growth.loop.early.records][:1]
    shuffled = run(narrow(), probe=[Task(9)(4000)])
    assert shuffled.growth.loop.early is not None
    (other,) = [record.held_out for record in shuffled.growth.loop.early.records][:1]
    assert told == pytest.approx(other, rel=0.05)
    assert net[0].out_features > 1


def test_sequences_in_a_list_are_asked_like_rows() -> None:
    torch.manual_seed(0)
    independent, warned = asked(Padded(), cross_entropy, [sequences(lengths=5) for _ in range(4)])
    assert independent is True
    assert not warned
