"""A look that takes several steps finds what one at once finds, and goes on in another process."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.kasmina.evidence.efficient import greedy
from esper.tolaria.growth.early import aside

STEPS, UNTIL = 100, 40
STILL = 1e-12  # a learning rate that moves no weight; where it is zero nothing is asked
Batch = tuple[Tensor, Tensor]


def batch(seed: int) -> Batch:
    """Draw what a fixed net says, (64, 8) both."""
    generator, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)
    first, second = (torch.randn(8, 8, generator=fixed) for _ in range(2))
    x = torch.randn(64, 8, generator=generator)
    return x, (x @ first).sin() @ second


def squared(model: nn.Module, given: Any) -> Tensor:
    """Return the mean squared error."""
    return F.mse_loss(model(given[0]), given[1])


class Run:
    """A host that is too narrow, and its loop."""

    def __init__(self, dear: float, rate: float = 0.01) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 8))
        self.optimizer = torch.optim.Adam(self.net.parameters(), rate)
        probe = [batch(1000 + i) for i in range(4)]
        self.growth = esper.grow(self.net, self.optimizer, squared, probe=probe, steps=STEPS)
        assert self.growth.loop.early is not None
        self.early = self.growth.loop.early
        self.early.evidence.dear = dear

    def train(self, first: int, last: int) -> None:
        """Take some steps."""
        for i in range(first, last):
            given = batch(i)
            loss = squared(self.net, given)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.growth.step(given, loss)


def test_where_the_weights_stand_still_both_find_the_same() -> None:
    looks = []
    for dear in (0.0, math.inf):
        run = Run(dear, rate=STILL)
        run.train(0, UNTIL)
        looks.append(run.early.records[0])
    spread, whole = looks
    assert spread.held_out == pytest.approx(whole.held_out, rel=1e-5)
    assert spread.examples == whole.examples
    for one, other in zip(spread.looked, whole.looked, strict=True):
        assert one.grown == other.grown
        assert one.p_value == pytest.approx(other.p_value, rel=1e-2)
        assert one.gain == pytest.approx(other.gain, rel=1e-3)


def test_no_step_reads_more_than_one_portion() -> None:
    run, portions = Run(0.0), list[int]()
    for i in range(STEPS):
        run.train(i, i + 1)
        look = run.early.evidence.under_way
        portions += [] if look is None else [look.at]
    run.growth.finish()
    assert len(portions) >= 9  # four of each kind, the picks, the losses, and the copy of the run
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(portions))
    assert run.growth.plans


def states(run: Run) -> Any:
    """Return what another process gets."""
    return copy.deepcopy(
        [part.state_dict() for part in (run.net, run.optimizer, run.growth)] + [torch.get_rng_state()]
    )


def test_a_run_cut_off_within_a_look_goes_on_with_the_same_bits() -> None:
    run, kept = Run(0.0), {}
    for i in range(UNTIL):
        run.train(i, i + 1)
        if run.early.asking is not None:
            kept[i + 1] = states(run)
    assert len(kept) >= 8
    for cut in sorted(kept)[:12]:
        other = Run(0.0)
        net, optimizer, growth, stream = kept[cut]
        other.growth.load_state_dict(growth)
        other.net.load_state_dict(net)
        other.optimizer.load_state_dict(optimizer)
        torch.set_rng_state(stream)
        other.train(cut, UNTIL)
        for name, tensor in run.net.state_dict().items():
            assert torch.equal(other.net.state_dict()[name], tensor), (cut, name)


def test_a_run_that_ends_within_a_look_says_so() -> None:
    run, i = Run(0.0), 0
    while run.early.asking is None:
        run.train(i, i + 1)
        i += 1
    run.growth.finish()
    assert run.early.records[-1].reason.startswith("skipped: the run ended")
    assert run.early.asking is None


def test_tensors_put_aside_are_the_same_and_leave_no_file(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(aside.tempfile, "tempdir", None)
    held = [torch.randn(5, 3), torch.arange(4), torch.randn(2, 8, 3, 3).to(memory_format=torch.channels_last)]
    held += [torch.randn(7).to(torch.bfloat16), torch.tensor(3.0)]
    for one, other in zip(aside.mapped(held), held, strict=True):
        assert torch.equal(one, other)
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())
    assert not list(tmp_path.iterdir())


def test_a_large_copy_that_finds_no_room_stays_in_memory_and_says_so(monkeypatch: Any) -> None:
    said, held = list[str](), [torch.randn(5, 3)]
    monkeypatch.setattr(aside, "LARGE", 1)
    monkeypatch.setattr(aside, "SPARE", 2**60)
    (copy,), on_disk = aside.copies(held, said.append)
    assert not on_disk
    assert torch.equal(copy, held[0])
    assert copy.data_ptr() != held[0].data_ptr()
    (told,) = said
    assert "stays in memory" in told
    assert "set TMPDIR" in told


def test_units_are_picked_alike_by_slopes_in_fewer_numbers() -> None:
    torch.manual_seed(0)
    rows = torch.randn(200, 24)
    slope = torch.randn(24, 300)
    basis = torch.linalg.qr(slope.T).R.T  # (24, 24): the same lengths and angles
    covariance = rows.T @ rows / 200
    assert torch.equal(greedy([covariance], [slope], 9, 1), greedy([covariance], [basis], 9, 1))
    reference = picked_in_full(covariance, slope, 9)
    assert greedy([covariance], [slope], 9, 1).tolist() == reference


def picked_in_full(left: Tensor, slope: Tensor, units: int) -> list[int]:
    """Pick one after the other, with slopes as they are."""
    found: list[int] = []
    for _ in range(units):
        power = slope.square().sum(1) / left.diagonal().clamp_min(1e-6)
        power[found] = -1
        best = int(power.argmax())
        found.append(best)
        share = left[:, best] / left[best, best]
        slope = slope - share[:, None] * slope[best]
        left = left - share[:, None] * left[best]
    return found
