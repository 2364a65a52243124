"""The gromo package (TINY, Verbockhaven et al., TMLR 2024), used as its own tutorial does.

Statistics over the whole training part, the optimal update, a line search over four scales on training
batches, then a new optimizer, since gromo carries no state over. The network is gromo's own container.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from gromo.containers.growing_mlp import GrowingMLP
from gromo.utils.training_utils import compute_statistics, evaluate_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.arms import Setup
from benchmarks.flops import STEP

GROWTHS = 5
SCALES = (0.0, 0.1, 0.5, 1.0)
SUMMED = {"mse_loss": nn.MSELoss, "cross_entropy": nn.CrossEntropyLoss}


class Gromo:
    """Grows one hidden layer from the small to the big width in at most ``GROWTHS`` even portions."""

    def __init__(self, setup: Setup, option: str) -> None:
        task = setup.task
        (small,), (big,) = task.small, task.big
        host = task.build(task.small, setup.seed)
        self.task, self.split, self.rate = task, setup.split, setup.rate
        self.net = GrowingMLP(
            host[0].in_features,
            host[2].out_features,
            hidden_size=small,
            number_hidden_layers=1,
            activation=nn.ReLU(),
            use_bias=host[0].bias is not None,
        )
        for layer, source in zip(self.net.layers, (host[0], host[2]), strict=True):
            layer.layer.load_state_dict(source.state_dict())  # the same initial weights as every other arm
        self.planned = min(GROWTHS, big - small)
        self.units = (big - small) // self.planned
        self.to_add = big - small
        self.every = max(1, round(task.epochs * 2 / 15))  # GradMax's 200 of 1500 steps
        self.optimizer = task.optimizer(self.net.parameters(), lr=self.rate)
        self.batches = task.batches(setup.split, setup.seed)
        size = task.batch or len(setup.split.train[0])
        self.survey = DataLoader(TensorDataset(*setup.split.train), batch_size=size)
        self.growths = self.training_flops = self.growth_flops = 0

    def epochs(self) -> Iterator[None]:
        for epoch in range(self.task.epochs):
            for x, y in self.batches:
                loss = self.task.loss(self.net(x), y)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
            weights = sum(layer.weight.numel() for layer in self.net.layers)
            self.training_flops += STEP * 2 * weights * len(self.split.train[0])
            if epoch > 0 and epoch % self.every == 0 and self.to_add > 0:
                self.grow()
            yield

    def grow(self) -> None:
        """Grow once; torch counts the products, not the eigen-decompositions, which favours gromo."""
        kind = SUMMED[self.task.loss.__name__]
        left = self.planned - self.growths
        units = self.to_add if left <= 1 else min(self.units, self.to_add)
        with FlopCounterMode(display=False) as counter, warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # "using the pseudo-inverse": its normal path on a singular covariance
            self.net.set_growing_layers(index=0)
            compute_statistics(self.net, self.survey, loss_function=kind(reduction="sum"))
            self.net.compute_optimal_updates(maximum_added_neurons=units)
            self.net.reset_computation()
            self.net.dummy_select_update()
            losses = {}
            for scale in SCALES:
                self.net.set_scaling_factor(scale)
                losses[scale], _ = evaluate_model(self.net, self.survey, kind(), use_extended_model=True)
            self.net.set_scaling_factor(min(losses, key=losses.__getitem__))
            before = self.net.layers[0].weight.shape[0]
            self.net.apply_change()
        self.net.train()
        self.net.zero_grad(set_to_none=True)
        self.to_add -= self.net.layers[0].weight.shape[0] - before
        self.growth_flops += int(counter.get_total_flops())
        self.optimizer = self.task.optimizer(self.net.parameters(), lr=self.rate)
        self.growths += 1


start = Gromo
