from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import STEP, forward_flops
from benchmarks.tasks import TASKS, cnn, mlp


def test_a_matrix_costs_two_per_weight() -> None:
    assert forward_flops(mlp(64, 10, (32,)), torch.rand(5, 64)) == 2 * (64 * 32 + 32 * 10)


def test_a_convolution_costs_two_per_weight_and_position() -> None:
    by_hand = 2 * (4 * 9 * 64 + 4 * 8 * 9 * 16 + 8 * 4 * 10)  # 8x8, then 4x4 after pooling, then 8·2·2 inputs
    assert forward_flops(cnn((4, 8)), torch.rand(3, 1, 8, 8)) == by_hand


def test_the_papers_figure() -> None:
    task = TASKS["student-teacher"]
    inputs = task.split(0).train[0]
    per_step = STEP * forward_flops(task.build(task.big, 0), inputs) * len(inputs)
    assert per_step * task.epochs == pytest.approx(1.80e9)  # 6 × 200 parameters × 1000 examples × 1500 steps


@pytest.mark.parametrize("name", ["digits-mlp", "digits-cnn"])
def test_a_step_costs_what_torch_counts_but_for_the_first_layers_input_gradient(name: str) -> None:
    task = TASKS[name]
    net = task.build(task.big, 0)
    x, y = (part[:64] for part in task.split(0).train)
    with FlopCounterMode(display=False) as counter:
        task.loss(net(x), y).backward()
    first = forward_flops(net[0], x) * len(x)
    assert STEP * forward_flops(net, x) * len(x) == counter.get_total_flops() + first
