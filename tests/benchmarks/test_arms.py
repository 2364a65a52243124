"""Each comparator trained for real; the figures GradMax published order them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import arms, runs
from benchmarks.arms.gradmax import GradMax, ReLU1
from benchmarks.runs import Job


def test_small_big_and_gradmax_fall_in_the_papers_order() -> None:
    small, big, gradmax = (
        runs.run(Job("student-teacher", arm, 0, 0.1)) for arm in ("fixed:small", "fixed", "gradmax")
    )
    assert gradmax.widths == big.widths == (10,)
    assert gradmax.growths == 5
    assert small.train > 0.3  # the paper's figure 3a: near 0.7
    assert gradmax.train < 0.3 * small.train
    assert big.train < 0.3 * small.train
    assert big.flops == 6 * 200 * 1000 * 1500
    parameters_by_step = 201 * 100 + 200 * (120 + 140 + 160 + 180) + 499 * 200
    assert gradmax.training_flops == 6 * 1000 * parameters_by_step
    assert 0 < gradmax.growth_flops < 0.01 * gradmax.training_flops


def test_gradmax_keeps_the_function_and_grows_the_steepest_direction() -> None:
    setup = Job("student-teacher", "gradmax", 0, 0.1).setup()
    arm = GradMax(setup, "")
    x, y = setup.split.train
    before = arm.net(x).detach()
    norm = arm.net[2].weight.norm(dim=0).mean()
    direct = arm.direct_gradient()
    arm.grow()
    torch.testing.assert_close(arm.net(x), before)
    outgoing = arm.net[2].weight[:, -1]
    assert outgoing.norm().item() == pytest.approx(norm.item(), rel=1e-5)
    assert (direct.T @ outgoing).norm().item() == pytest.approx(
        float(torch.linalg.matrix_norm(direct, 2)) * norm.item(), rel=1e-4
    )
    setup.task.loss(arm.net(x), y).backward()
    assert arm.net[0].weight.grad[-1].norm() > 0


def test_the_notebooks_relu_has_slope_one_at_zero() -> None:
    for module, slope in ((ReLU1(), 1.0), (nn.ReLU(), 0.0)):
        at_zero = torch.zeros(1, requires_grad=True)
        module(at_zero).backward()
        assert at_zero.grad.item() == slope


def test_gradmax_refuses_what_its_notebook_does_not_do() -> None:
    with pytest.raises(ValueError, match="full batch"):
        runs.run(Job("digits-mlp", "gradmax", 0, 0.01, epochs=1))


GROMO_RUNS = [("student-teacher", 0.3, 150), ("digits-mlp", 0.01, 15)]


@pytest.mark.skipif(not arms.installed("gromo"), reason="gromo is an optional comparator")
@pytest.mark.filterwarnings("ignore")  # gromo's own
@pytest.mark.parametrize(("task", "rate", "epochs"), GROMO_RUNS)
def test_gromo_grows_from_the_same_weights_to_the_same_size(task: str, rate: float, epochs: int) -> None:
    job = Job(task, "gromo", 0, rate, epochs=epochs)
    setup = job.setup()
    x = setup.split.train[0]
    host = setup.task.build(setup.task.small, 0)
    assert torch.allclose(arms.start("gromo", setup).net(x), host(x), atol=1e-6)
    result = runs.run(job)
    assert result.widths == setup.task.big
    assert result.growths == 5
    assert result.growth_flops > 0
    small = runs.run(Job(task, "fixed:small", 0, rate, epochs=epochs))
    better = result.test > small.test if setup.task.higher_is_better else result.test < small.test
    assert better


def test_a_fixed_run_repeats_itself_bit_for_bit() -> None:
    job = Job("digits-mlp", "fixed", 5, 0.01, (7,), epochs=2)
    first, again = runs.run(job), runs.run(job)
    assert first.widths == (7,)
    assert (first.test_loss, first.curve) == (again.test_loss, again.curve)
    assert first.training_flops == 2 * 1077 * 6 * (64 * 7 + 7 * 10)


def test_measuring_a_curve_does_not_move_the_training() -> None:
    job = Job("digits-cnn", "fixed:small", 0, 0.01, epochs=2)
    setup = job.setup()
    alone = arms.start("fixed:small", setup)
    for _ in alone.epochs():
        pass
    x, y = setup.split.test
    assert float(setup.task.loss(runs.predict(alone.net, x), y)) == runs.run(job).test_loss


def test_arms_side_by_side_train_to_the_end() -> None:
    jobs = (
        Job("digits-mlp", "fixed", 0, 0.01, epochs=2),
        Job("digits-mlp", "fixed:small", 0, 0.01, epochs=2),
    )
    assert all(seconds > 0 for seconds in runs.side_by_side(jobs))


def test_a_grown_run_pays_for_growth_and_stays_within_its_budget() -> None:
    small, grown, big = (
        runs.run(Job("student-teacher", arm, 1, 0.3, epochs=150)) for arm in ("fixed:small", "grown", "fixed")
    )
    assert grown.growths > 0
    assert small.parameters < grown.parameters <= big.parameters
    assert small.flops < grown.training_flops < big.flops
    assert grown.growth_flops > 0
    assert grown.train < small.train


def test_where_nothing_is_kept_the_grown_run_is_its_twin_bit_for_bit() -> None:
    grown, twin = (runs.run(Job("breast-cancer", arm, 0, 0.01)) for arm in ("grown", "fixed:small"))
    assert grown.growths == 0
    assert grown.growth_flops > 0  # it did look
    assert grown.training_flops == twin.training_flops
    assert (grown.test_loss, grown.train) == (twin.test_loss, twin.train)
