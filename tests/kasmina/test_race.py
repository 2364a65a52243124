"""Candidates side by side: what they learn, who wins, and that the model never knows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.race.initialisers import survey
from esper.kasmina.race.race import AMPLITUDES, FASTEST, REACH, RELATIVE, Race, rms
from esper.kasmina.seeds.layer import Tap
from tests.kasmina.hosts import frozen, same


class Teacher:
    """A host of one unit that should have four, the gradient it gets, and a race beside it."""

    def __init__(
        self,
        host: nn.Module | None = None,
        starts: tuple[str, ...] = ("svd",) * 3 + ("random",),
        units: int = 2,
    ) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(64, 6)
        self.y = torch.tanh(self.x @ torch.randn(6, 4)) @ torch.randn(4, 3)
        self.host = host or nn.Sequential(nn.Linear(6, 1), nn.Tanh(), nn.Linear(1, 3))
        self.model: MorphableModel = esper.wrap(self.host, self.x)
        name = next(iter(self.model.pairs))
        self.layer, self.tap = self.model.layer(name, print), Tap()
        self.layer.tap = self.tap
        self.run().backward()
        assert self.tap.gradient is not None
        pool = survey(self.model.pairs[name], self.x, self.tap.gradient, 8)
        self.race = Race(self.layer, units, starts, pool, self.x, None)

    def run(self) -> Tensor:
        return F.mse_loss(self.host(self.x), self.y)

    def nothing(self) -> float:
        with torch.no_grad():
            return float(self.run())

    def losses(self) -> Tensor:
        with torch.no_grad():
            return self.race.losses(self.run)


def test_every_candidate_starts_as_nothing() -> None:
    made = Teacher()
    assert torch.equal(made.losses(), made.run().detach().expand(4))


def test_stacked_candidates_have_the_losses_and_gradients_each_has_alone() -> None:
    made = Teacher()
    with torch.no_grad():
        made.race.parameters["consumer_weight"].normal_()
    together = made.race.losses(made.run)
    weights = list(made.race.parameters.values())
    gradients = torch.autograd.grad(together.sum(), weights)
    assert made.race.batched
    for index in range(4):
        kernel = made.race.kernel(index, 1.0)
        with made.layer.showing(kernel):
            alone = made.run()
        torch.testing.assert_close(together[index], alone)
        for stack, one in zip(gradients, torch.autograd.grad(alone, list(kernel.parameters())), strict=True):
            torch.testing.assert_close(stack[index], one, rtol=1e-4, atol=1e-5)


def test_lessons_lower_every_candidates_loss_and_leave_the_host_alone() -> None:
    made = Teacher()
    before, nothing = frozen(dict(made.host.state_dict())), made.nothing()
    gradients = [p.grad.clone() for p in made.host.parameters()]
    for _ in range(60):
        made.race.learn_from_shadow(made.run)
    assert bool((made.losses() < 0.95 * nothing).all())
    assert same(dict(made.host.state_dict()), before)
    assert all(torch.equal(p.grad, g) for p, g in zip(made.host.parameters(), gradients, strict=True))


def test_a_tap_alone_teaches_too_and_a_stale_one_teaches_nothing() -> None:
    made = Teacher()
    nothing = made.nothing()
    for _ in range(100):
        made.race.learn_from_tap(made.tap)
    assert float(made.losses().min()) < nothing
    learned = frozen(made.race.parameters)
    made.x.add_(0.0)
    made.race.learn_from_tap(made.tap)
    assert same(dict(made.race.parameters), learned)


def test_the_closed_form_lesson_is_the_ridge_solution_it_says_it_is() -> None:
    made = Teacher()
    assert made.tap.scale is not None
    nothing = made.nothing()
    made.race.fit(made.x, made.tap.gradient, made.tap.scale)
    assert bool((made.losses() < nothing).all()), "one step of regression down the gradient helps everyone"
    kernel = made.race.kernel(0, 1.0)
    slope = made.tap.gradient
    rows = slope.square().mean(1, keepdim=True).sqrt()
    target = -slope * (0.3 * made.tap.scale / rows.clamp_min(rms(slope)))
    h = kernel(made.x, True).detach()
    ridge = 0.01 * (h.T @ h).diagonal().mean() + 1e-8
    solved = torch.linalg.solve(h.T @ h + ridge * torch.eye(2), h.T @ target)
    torch.testing.assert_close(kernel.consumer_weight.detach(), solved.T, rtol=1e-3, atol=1e-5)


def test_halving_keeps_the_better_half_with_its_momentum() -> None:
    made = Teacher(starts=("svd", "svd", "random", "random", "random"))
    for _ in range(3):
        made.race.learn_from_shadow(made.run)
    kept = made.race.scores.argsort()[:3]
    weights, state = frozen(made.race.parameters), frozen(list(made.race.optimizer.state.values()))
    starts = made.race.starts
    made.race.halve()
    assert made.race.starts == tuple(starts[int(i)] for i in kept)
    assert all(torch.equal(p, weights[n][kept]) for n, p in made.race.parameters.items())
    for parameter, old in zip(made.race.parameters.values(), state, strict=True):
        new = made.race.optimizer.state[parameter]
        assert torch.equal(new["exp_avg"], old["exp_avg"][kept])
        assert torch.equal(new["step"], old["step"])
    before = made.losses()
    for _ in range(20):
        made.race.learn_from_shadow(made.run)
    assert bool((made.losses() < before).all())


def test_a_non_finite_candidate_comes_last_and_harms_no_other() -> None:
    made, other = Teacher(), Teacher()
    with torch.no_grad():
        made.race.parameters["producer_weight"][1] = float("nan")
    for race, run in ((made.race, made.run), (other.race, other.run)):
        for _ in range(5):
            race.learn_from_shadow(run)
    assert int(made.race.scores.argmax()) == 1
    for index in (0, 2, 3):
        assert torch.equal(
            made.race.parameters["consumer_weight"][index], other.race.parameters["consumer_weight"][index]
        )
    made.race.halve()
    assert bool(made.losses().isfinite().all())


def test_amplitudes_scale_one_candidate_and_zero_is_the_host() -> None:
    made = Teacher()
    for _ in range(20):
        made.race.learn_from_shadow(made.run)
    curve = made.race.amplitudes(2, made.run)
    torch.testing.assert_close(curve[0], made.run().detach())
    torch.testing.assert_close(curve[AMPLITUDES.index(1.0)], made.losses()[2])
    with made.layer.showing(made.race.kernel(2, 4.0)), torch.no_grad():
        torch.testing.assert_close(curve[-1], made.run())


def test_rates_fall_with_fan_in_and_follow_the_incoming_weights() -> None:
    for units in (2, 40):
        made = Teacher(units=units)
        groups = dict(zip(made.race.parameters, made.race.optimizer.param_groups, strict=True))
        assert groups["consumer_weight"]["lr"] == min(FASTEST, REACH / units)
        expected = RELATIVE * float(rms(made.race.parameters["producer_weight"].detach()))
        assert groups["producer_weight"]["lr"] == pytest.approx(expected)


def test_a_model_that_does_not_run_under_vmap_races_one_by_one_to_the_same_losses() -> None:
    class Branching(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return x if x.sum().item() < 1e9 else -x

    plain = nn.Sequential(nn.Linear(6, 1), nn.Tanh(), nn.Linear(1, 3))
    branching = Branching(*plain)
    made, other = Teacher(branching), Teacher(plain)
    for race in (made.race, other.race):
        with torch.no_grad():
            race.parameters["consumer_weight"].copy_(torch.linspace(-1, 1, 24).view(4, 3, 2))
    for name, weight in other.race.parameters.items():
        with torch.no_grad():
            made.race.parameters[name].copy_(weight)
    torch.testing.assert_close(made.losses(), other.losses())
    assert (made.race.batched, other.race.batched) == (False, True)


def test_a_race_goes_on_from_its_state() -> None:
    made = Teacher()
    for _ in range(4):
        made.race.learn_from_shadow(made.run)
    made.race.halve()
    state = made.race.state_dict()
    other = Teacher(starts=("random",) * 2)
    other.host.load_state_dict(made.host.state_dict())
    other.race.load_state_dict(state)
    for each in (made, other):
        for _ in range(4):
            each.race.learn_from_shadow(each.run)
    assert same(dict(other.race.parameters), dict(made.race.parameters))
    assert not same(dict(made.race.parameters), state["parameters"]), "nothing was learned"
