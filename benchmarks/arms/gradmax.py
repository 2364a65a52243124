"""GradMax (Evci et al., ICLR 2022), as in its Student_Teacher.ipynb: one neuron every 200 of 1500 steps.

A new neuron's incoming weights are zero, its outgoing weights the top left singular vector of dL/dW of a
direct linear layer beside the pair, with the mean norm of the outgoing weights that exist. Its ReLU has slope
1 at 0, without which a neuron with zero incoming weights never learns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.arms import Setup
from benchmarks.flops import STEP, forward_flops

EVERY = 200 / 1500  # share of the steps between growths


class ReLU1(nn.Module):
    """max(x, 0) with slope 1 at 0, as the notebook's ``relu1``; nn.ReLU's slope there is 0."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=0)


class GradMax:
    """Grows the hidden layer of a bias-free two-layer network; full batch, plain SGD."""

    def __init__(self, setup: Setup, option: str) -> None:
        if setup.task.batch is not None:
            raise ValueError(
                "the GradMax port follows its notebook: full batch, two linear layers, no biases"
            )
        self.task, self.rate = setup.task, setup.rate
        self.examples = setup.split.train
        self.net = setup.task.build(setup.task.small, setup.seed)
        self.net[1] = ReLU1()
        self.optimizer = self.task.optimizer(self.net.parameters(), lr=self.rate)
        self.to_add = setup.task.big[0] - setup.task.small[0]
        self.every = max(1, round(EVERY * self.task.epochs))
        self.growths = self.training_flops = self.growth_flops = 0

    def epochs(self) -> Iterator[None]:
        x, y = self.examples
        step_flops = STEP * forward_flops(self.net, x) * len(x)
        for step in range(self.task.epochs):
            loss = self.task.loss(self.net(x), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.training_flops += step_flops
            if step > 0 and step % self.every == 0 and self.growths < self.to_add:
                self.grow()
                step_flops = STEP * forward_flops(self.net, x) * len(x)
            yield

    def grow(self) -> None:
        """Add one neuron; SGD without momentum has no state to carry."""
        inner, outer = self.net[0], self.net[2]
        outgoing = torch.linalg.svd(self.direct_gradient())[0][:, :1]  # (outputs, 1)
        with torch.no_grad():
            outgoing *= outer.weight.norm(dim=0).mean()
            incoming = torch.zeros(1, inner.in_features)
            self.net[0] = linear(torch.cat([inner.weight, incoming]))
            self.net[2] = linear(torch.cat([outer.weight, outgoing], dim=1))
        self.optimizer = self.task.optimizer(self.net.parameters(), lr=self.rate)
        self.growths += 1

    def direct_gradient(self) -> Tensor:
        """Return dL/dW of a zero linear layer from the pair's input to its output, (outputs, inputs)."""
        x, y = self.examples
        outputs = self.net(x).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.task.loss(outputs, y), outputs)
        # A forward pass for the outputs, a product for the gradient; the SVD of 10x10 is below 0.1 % of that.
        self.growth_flops += forward_flops(self.net, x) * len(x) + 2 * gradient.numel() * x.shape[1]
        return gradient.T @ x


def linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    return layer


start = GradMax
