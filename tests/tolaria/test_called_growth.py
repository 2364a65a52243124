"""Models that a loss calls several times grow: contrastive views, R-Drop, a physics problem and its ends."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Adam

import esper
from esper.contracts import Event
from esper.errors import SiteError
from esper.tolaria.growth.early import insertion

Loss = Callable[[nn.Module, Any], Tensor]
Draw = Callable[[torch.Generator, bool], Any]  # a batch to learn from, or one held out

DIGITS = load_digits()
ORDER = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
X = torch.tensor(DIGITS.data, dtype=torch.float32)[ORDER] / 16
Y = torch.tensor(DIGITS.target)[ORDER]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Encoder(nn.Module):
    """Pictures to points on a sphere."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 16)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.net(x), dim=-1)


def some(generator: torch.Generator, held: bool) -> Tensor:
    first, last = (1200, 1500) if held else (0, 1200)
    return torch.randint(first, last, (64,), generator=generator)


def augmented(generator: torch.Generator, held: bool) -> tuple[Tensor, Tensor]:
    """Two views of the same pictures: a third of the pixels gone, noise on the others."""
    x = X[some(generator, held)]
    one, other = (
        x * (torch.rand(x.shape, generator=generator) > 0.3) + 0.2 * torch.randn(x.shape, generator=generator)
        for _ in range(2)
    )
    return one, other


def unrelated(generator: torch.Generator, held: bool) -> tuple[Tensor, Tensor]:
    """Views of nothing."""
    return torch.randn(64, 64, generator=generator), torch.randn(64, 64, generator=generator)


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    one, other = model(batch[0]), model(batch[1])
    logits, target = one @ other.T * 5, torch.arange(len(one))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def classifier(width: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 10)
    )


def labelled(generator: torch.Generator, held: bool) -> tuple[Tensor, Tensor]:
    which = some(generator, held)
    return X[which], Y[which]


def r_drop(model: nn.Module, batch: Any) -> Tensor:
    """Two passes with other units dropped: both right, and alike (Liang et al., arXiv:2106.14448)."""
    one, other = (model(batch[0]).log_softmax(-1) for _ in range(2))
    apart = F.kl_div(one, other, log_target=True, reduction="batchmean")
    apart = apart + F.kl_div(other, one, log_target=True, reduction="batchmean")
    return (F.nll_loss(one, batch[1]) + F.nll_loss(other, batch[1])) / 2 + apart / 4


def field(width: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
    )


def interval(generator: torch.Generator, held: bool) -> tuple[Tensor, Tensor]:
    return torch.rand(64, 1, generator=generator) * 2 - 1, torch.tensor([-1.0, 1.0]).repeat(8)[:, None]


def poisson(model: nn.Module, batch: Any) -> Tensor:
    """u'' = -ω² sin ωx inside, u = 0 at the ends; u = sin ωx."""
    x, ends = batch[0].clone().requires_grad_(), batch[1]
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    omega = 2 * torch.pi
    inside = (bend + omega**2 * torch.sin(omega * x)).square().mean() / omega**3
    return inside + 10 * model(ends).square().mean()


class Run:
    """A plain loop."""

    def __init__(
        self,
        net: nn.Module,
        loss: Loss,
        draw: Draw,
        steps: int,
        seed: int = 0,
        rate: float = 0.005,
        **options: Any,
    ) -> None:
        torch.manual_seed(seed)
        self.net, self.loss, self.draw, self.steps, self.seed = net, loss, draw, steps, seed
        self.optimizer = Adam(net.parameters(), rate)
        self.events: list[Event] = []
        self.now, held = 0, generator(99)
        self.probe = [draw(held, True) for _ in range(40)]
        self.growth = esper.grow(
            net,
            self.optimizer,
            loss,
            steps=steps,
            on_event=self.events.append,
            **{"probe": self.probe, **options},
        )

    def to(self, step: int) -> Run:
        while self.now < step:
            batch = self.draw(generator(1000 * self.seed + self.now), False)
            self.now += 1
            torch.manual_seed(self.now)  # of dropout
            loss = self.loss(self.net, batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.growth.step(batch, loss)
        return self

    def end(self) -> Run:
        self.to(self.steps).growth.finish()
        return self

    @property
    def widened(self) -> list[str]:
        return [event.data["site"] for event in self.events if event.kind == "widened"]

    @property
    def independent(self) -> bool | None:
        assert self.growth.loop.early is not None
        return self.growth.loop.early.evidence.independent


def built(make: Callable[[], nn.Module], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return make()


def neighbours(net: nn.Module) -> float:
    """Share of test pictures whose nearest training picture shows the same digit."""
    with torch.no_grad():
        z = net(X)
    return float((Y[:1200][(z[1500:] @ z[:1200].T).argmax(1)] == Y[1500:]).float().mean())


def test_contrastive_views_grow_an_encoder() -> None:
    run = Run(built(Encoder), contrastive, augmented, 600)
    assert neighbours(run.net) < 0.8
    assert run.growth.run.recipe == "early", "what auto chooses"
    assert run.independent is False, "batches are the evidence"
    assert {place.site.calls for place in run.growth.run.morphable.places.values()} == {2}
    run.end()
    assert set(run.widened) == {"net.0>net.2", "net.2>net.4"}
    assert neighbours(run.net) >= 0.85


def test_views_of_nothing_grow_nothing() -> None:
    assert not Run(built(Encoder), contrastive, unrelated, 300).end().widened


def test_r_drop_has_each_example_as_evidence_and_grows() -> None:
    run = Run(built(classifier), r_drop, labelled, 400)
    assert run.independent is True
    run.end()
    assert set(run.widened) == {"0>4"}
    with torch.no_grad():
        right = run.net.eval()(X[1500:]).argmax(1) == Y[1500:]
    assert float(right.float().mean()) >= 0.93
    assert isinstance(run.net, nn.Sequential)
    assert run.net[1].num_features == run.net[4].in_features >= 12


def test_the_inside_and_the_ends_of_a_physics_problem_grow_a_field() -> None:
    run = Run(built(field), poisson, interval, 1000)
    assert run.independent is False, "the ends are nobody's"
    assert run.growth.loop.early is not None
    assert run.growth.loop.early.evidence.inner
    run.end()
    assert not [event for event in run.events if event.kind == "warning"]
    assert set(run.widened) == {"0>2", "2>4"}
    t = torch.linspace(-1, 1, 201)[:, None]
    with torch.no_grad():
        error = float((run.net(t) - torch.sin(2 * torch.pi * t)).square().mean().sqrt())
    assert error < 0.2, "a field of 3 units ends at .7"


def test_losses_by_example_do_not_make_examples_of_what_all_share() -> None:
    def by_example(model: nn.Module, batch: Any) -> Tensor:
        ends: Tensor = model(batch[1]).square().mean()
        return (model(batch[0])[:, 0] - torch.sin(batch[0][:, 0])).square() + ends

    def mean(model: nn.Module, batch: Any) -> Tensor:
        return by_example(model, batch).mean()

    assert Run(built(field), mean, interval, 100, per_example=by_example).independent is False

    def alone(model: nn.Module, batch: Any) -> Tensor:
        one, other = model(batch[0]), model(-batch[0])
        return (one + other).square()[:, 0]

    def alone_mean(model: nn.Module, batch: Any) -> Tensor:
        return alone(model, batch).mean()

    assert Run(built(field), alone_mean, interval, 100, per_example=alone).independent is True


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_nothing_any_call_says_changes_at_the_moment_of_an_event(training: bool) -> None:
    run = Run(built(Encoder), contrastive, augmented, 600, config={"early": {"reopen": "no"}})
    early = run.growth.loop.early
    assert early is not None
    wide = Encoder()
    while run.now < 300 and early.open is None:
        copied = copy.deepcopy(run.net)
        run.to(run.now + 1)
        wide = run.net
    assert early.open is not None, "nothing grew"
    twin = copy.deepcopy(wide).train(training)
    names = dict(copied.named_parameters())
    old = Encoder().train(training)
    with torch.no_grad():  # what was there has moved by one step; without what is new it says the same
        for name, parameter in old.named_parameters():
            parameter.copy_(twin.get_parameter(name)[tuple(slice(0, n) for n in names[name].shape)])
        for view in run.probe[0]:
            assert torch.allclose(old(view), twin(view), rtol=1e-5, atol=1e-5)


def test_a_call_that_changes_is_noticed_though_the_last_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(built(Encoder), contrastive, augmented, 600)
    early = run.growth.loop.early
    assert early is not None
    places = run.growth.run.morphable.pairs
    kernels = {name: place.kernel(2) for name, place in places.items()}
    asked, outputs = list[Any](), insertion.outputs

    def spoiled(*given: Any) -> dict[str, list[Tensor]]:
        said = outputs(*given)
        assert all(len(calls) == 2 for calls in said.values())
        asked.append(said)
        return {path: [first + len(asked) - 1, second] for path, (first, second) in said.items()}

    monkeypatch.setattr(insertion, "outputs", spoiled)
    before = early.insertion.remember(0)
    told = early.insertion.widen(kernels, dict.fromkeys(kernels, 2), before, {})
    assert "the grown layers differ from the branch" in told
    assert run.growth.run.morphable.parameter_count() == sum(p.numel() for p in Encoder().parameters())


def test_a_run_that_was_cut_goes_on_bit_for_bit(tmp_path: Path) -> None:
    run = Run(built(Encoder), contrastive, augmented, 300)
    early, states, opened = run.growth.loop.early, dict[int, list[Any]](), False
    assert early is not None
    while run.now < 300:
        if run.now == 150 or (early.open is not None and not opened):
            parts = run.growth, run.net, run.optimizer
            states[run.now] = copy.deepcopy([part.state_dict() for part in parts])
            opened |= early.open is not None
        run.to(run.now + 1)
    run.end()
    assert opened, "no state was taken while an event was open"
    for cut, state in states.items():
        torch.save(state, tmp_path / "state.pt")
        other = Run(built(Encoder, 7), contrastive, augmented, 300)
        for part, own in zip(
            (other.growth, other.net, other.optimizer),
            torch.load(tmp_path / "state.pt", weights_only=True),
            strict=True,
        ):
            part.load_state_dict(own)
        other.now = cut
        other.end()
        for name, tensor in run.net.state_dict().items():
            assert torch.equal(other.net.state_dict()[name], tensor), (cut, name)


def test_a_race_refuses_them_and_says_what_takes_them() -> None:
    with pytest.raises(SiteError, match=r"called 2 times in a pass.*growth='early' can widen it"):
        Run(built(Encoder), contrastive, augmented, 600, growth="incubate", config={"blueprints": ["widen"]})
