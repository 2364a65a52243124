"""Where examples lie in a batch: declared, or shown by the loss; and batches that no axis cuts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

import esper
from esper.batches.axes import Axes, BatchAxis
from esper.batches.examples import copied, count_examples, join, split_batch, take
from esper.batches.known import rows_of
from esper.batches.portions import cut
from esper.batches.share import Share
from esper.errors import ConfigError, ProbeError
from tests.cases.loops import Task, cross_entropy, run

TIME = 7


class Last(nn.Module):
    """Says a class after the last moment."""

    def __init__(self, batch_first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.batch_first = batch_first
        self.l, self.o = nn.LSTM(10, 2, batch_first=batch_first), nn.Linear(2, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (batch, 10)."""
        y, _ = self.l(x)
        return self.o(y[:, -1] if self.batch_first else y[-1])


def sequences(time: int = TIME, batch_first: bool = False) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Draw sequences whose class shows near their end."""
    task, noise = Task(), torch.Generator().manual_seed(2)

    def draw(n: int = 48) -> tuple[Tensor, Tensor]:
        x, y = task(n)
        made = 0.1 * torch.randn(time, n, 10, generator=noise)
        made[-2] += x
        return (made.transpose(0, 1).contiguous() if batch_first else made), y

    return draw


def evidence_of(made: Any) -> int:
    assert made.growth.loop.early is not None
    return made.growth.loop.early.evidence.found_values


@pytest.mark.parametrize("axis", [1, (1, 0), None])
def test_time_before_batch_grows_what_batch_before_time_does(axis: BatchAxis | None) -> None:
    net, twin = Last(), Last(batch_first=True)
    made = run(net, draw=sequences(), batch_axis=axis)
    other = run(twin, draw=sequences(batch_first=True))
    assert evidence_of(made) == evidence_of(other) == 256
    assert other.growth.plans
    assert [p.site for p in made.growth.plans] == [p.site for p in other.growth.plans]
    assert torch.allclose(net.o.weight, twin.o.weight, atol=1e-4)
    shown = [warning for warning in made.warnings if "axis 1" in warning]
    assert len(shown) == (axis is None), "what was found by oneself is said"
    assert not other.warnings


def test_as_many_moments_as_examples() -> None:
    made = run(Last(), draw=sequences(48), batch_axis=1, probe=[sequences(48)(48) for _ in range(6)])
    assert evidence_of(made) == 6 * 48
    assert made.growth.plans


class Tokens(nn.Module):
    """Says the next token, time first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.l, self.o = nn.Embedding(10, 8), nn.GRU(8, 2), nn.Linear(2, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (time, batch, 10)."""
        return self.o(self.l(self.e(x))[0])


def tokens(n: int = 48) -> tuple[Tensor, Tensor]:
    x = torch.randint(10, (12, n), generator=TOKENS)
    return x, x.roll(1, 0)


TOKENS = torch.Generator().manual_seed(1)


def spelt(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


@pytest.mark.parametrize("growth", ["early", "incubate"])
def test_tables_of_tokens_are_told_by_their_losses(growth: Literal["early", "incubate"]) -> None:
    made = run(Tokens(), spelt, tokens, growth=growth, config={}, probe=[tokens(256), tokens(256)])
    assert any("axis 1 of the batches, 256 of them" in warning for warning in made.warnings)
    declared = run(Tokens(), spelt, tokens, batch_axis=0, config={}, probe=[tokens(256)])
    assert evidence_of(declared) == 12, "what is declared is believed"


def test_what_cannot_be_told_is_said_once() -> None:
    class Bigram(nn.Module):
        """Looks at each token alone."""

        def __init__(self) -> None:
            super().__init__()
            self.e, self.a, self.b = nn.Embedding(10, 10), nn.Linear(10, 1), nn.Linear(1, 10)

        def forward(self, x: Tensor) -> Tensor:
            """Return logits."""
            return self.b(torch.tanh(self.a(self.e(x))))

    made = run(Bigram(), spelt, tokens)
    told = [warning for warning in made.warnings if "batch_axis" in warning]
    assert len(told) == 1
    assert "cannot be told" in told[0]
    assert "axis 0 is taken, 12 of them" in told[0]
    assert not [w for w in run(Bigram(), spelt, tokens, batch_axis=1).warnings if "batch_axis" in w]


def test_images_and_vectors_are_not_asked() -> None:
    asked = []

    def loss(batch: Any) -> float:
        asked.append(batch)
        return 0.0

    for x in (torch.zeros(6, 5), torch.zeros(6, 3, 4, 4), torch.zeros(6, 4, 5)):
        axes = Axes()
        assert not axes.settle((x, torch.zeros(6)), loss)
        assert not axes.said
    assert not asked


def test_batches_come_in_by_views_and_leave_as_they_came() -> None:
    @dataclasses.dataclass
    class Pair:
        x: Tensor
        y: np.ndarray

    x, y = torch.arange(24.0).view(2, 3, 4), np.arange(6).reshape(3, 2)
    for batch, axis in (((x, y), (1, 0)), (Pair(x, y), {"x": 1}), ({"x": x, "y": y}, {"x": 1}), ((x, y), 1)):
        axes = Axes(axis)
        probe = axes.begin([batch])
        (inside,) = probe
        assert count_examples(inside) == 3
        leaves, batched, nest, _ = split_batch(inside)
        assert batched == [True, True]
        assert leaves[0].data_ptr() == x.data_ptr()
        back = axes.outward(leaves, nest)
        assert torch.equal(back[0], x)
        assert np.array_equal(back[1], y)


@pytest.mark.parametrize("axis", [-1, 1.0, True, "1", (), {}, [1, "0"], {"x": -1}, 99])
def test_no_axis(axis: Any) -> None:
    with pytest.raises(ConfigError, match="batch_axis"):
        run(Last(), draw=sequences(), batch_axis=axis)


@pytest.mark.parametrize("axis", [5, (1, 0, 0), {"x": 1}, (1, 1)])
def test_an_axis_that_no_batch_has(axis: Any) -> None:
    with pytest.raises(ProbeError, match="batch_axis"):
        run(Last(), draw=sequences(), batch_axis=axis)


def test_trainer_and_shares_know_the_axis() -> None:
    net, draw = Last(), sequences()
    batches = [draw(48) for _ in range(3)]
    optimizer = torch.optim.Adam(net.parameters())
    trainer = esper.Trainer(
        net, optimizer, cross_entropy, train=batches, probe=[draw(64)], epochs=1, batch_axis=1
    )
    trainer.fit()
    assert trainer._examples(batches[0]) == 48
    for rank in (0, 1):
        (x, y), *_ = Share(batches, rank, 2, batch_axis=1)
        assert torch.equal(x, batches[0][0][:, rank::2])
        assert torch.equal(y, batches[0][1][rank::2])


def packed(n: int, begin: int = 0) -> PackedSequence:
    return pack_sequence(
        [torch.full((1 + i % 3, 2), float(begin + i)) for i in range(n)], enforce_sorted=False
    )


def values(one: PackedSequence) -> list[float]:
    return [float(each[0, 0]) for each in unpack_sequence(one)]


def test_packed_sequences_are_cut_and_joined_by_their_sequences() -> None:
    batch = packed(5), torch.arange(5)
    assert count_examples(packed(5)) == count_examples(batch) == 5
    assert values(take(batch, torch.tensor([3, 1]))[0]) == [3.0, 1.0]  # type: ignore[index]
    assert [values(one[0]) for one in cut(batch, 3)] == [[0.0, 1.0], [2.0, 3.0, 4.0]]  # type: ignore[index]
    (whole,) = join([batch, (packed(3, 5), torch.arange(3))])
    assert values(whole[0]) == [*map(float, range(8))]  # type: ignore[index]
    assert [len(one) for one in unpack_sequence(whole[0])] == [1, 2, 3, 1, 2, 1, 2, 3]  # type: ignore[index]
    assert len(rows_of(batch)[0]) == 5
    own = copied(batch)
    assert own[0].data.data_ptr() != batch[0].data.data_ptr()  # type: ignore[index]
    ordered = pack_sequence([torch.zeros(3, 1), torch.zeros(1, 1)])
    assert take(ordered, torch.tensor([0])).sorted_indices is None  # type: ignore[attr-defined]


def test_packed_sequences_are_evidence() -> None:
    class Packed(Last):
        """Reads packed sequences."""

        def forward(self, x: PackedSequence) -> Tensor:
            """Return logits."""
            _, (h, _) = self.l(x)
            return self.o(h[-1])

    task = Task()

    def draw(n: int = 48) -> Any:
        x, y = task(n)
        return pack_sequence([one.repeat(1 + i % 4, 1) for i, one in enumerate(x)], enforce_sorted=False), y

    made = run(Packed(), draw=draw, growth="incubate", config={"gate": {"false_keep": 0.5}})
    assert made.growth.plans


class Graphs(SimpleNamespace):
    """Looks like a batch of graphs."""

    num_graphs = 6


def test_a_batch_of_graphs_is_named_and_a_list_of_them_is_read() -> None:
    graphs = Graphs(x=torch.zeros(18, 2), edge_index=torch.zeros(2, 9), _store={"y": torch.zeros(6)})
    with pytest.raises(ProbeError, match=r"Graphs \(x, edge_index, y\).*a list with one such object"):
        run(Last(), lambda m, b: m(b.x.repeat(1, 5)[None]).sum(), lambda n=48: graphs)
    with pytest.raises(ProbeError, match="with a row for each of 6 examples"):
        run(
            Last(),
            lambda m, b: m(b[1]).square().mean(),
            lambda n=48: (graphs, torch.randn(3, 6, 10)[0][:, None]),
        )
    for n in (1, 3, 9):
        several = [Graphs(x=torch.full((3, 2), float(i))) for i in range(n)]
        assert count_examples(several) == n
        assert take(several, torch.tensor([n - 1])) == several[-1:]


def test_a_graph_that_all_examples_share_is_left_alone() -> None:
    task, shared = Task(), Graphs(edges=torch.eye(10))

    class Over(nn.Module):
        """Spreads values over a graph."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(10, 1), nn.Linear(1, 10)

        def forward(self, x: Tensor, graph: Graphs) -> Tensor:
            """Return logits."""
            return self.b(torch.tanh(self.a(x @ graph.edges)))

    net = Over()
    made = run(net, lambda m, b: F.cross_entropy(m(b[0], b[2]), b[1]), lambda n=48: (*task(n), shared))
    assert net.a.out_features > 1
    assert not made.warnings
