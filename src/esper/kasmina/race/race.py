"""A race: candidates of one width at one site learn side by side, the model untouched, and are compared.

All candidates are one stack of tensors run under ``vmap``. Their first lesson is what training showed at the
site (input and gradient, in closed form); then, every k-th step, it is the real loss behind the site with
their output added (a shadow pass), and between those the tapped gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from esper.blueprints.kernel import LiveKernel
from esper.distributed.collectives import ALONE, Peers
from esper.kasmina.race.initialisers import Survey, centre, sow
from esper.kasmina.seeds.layer import KasminaLayer, Tap
from esper.kasmina.widths.layers import is_linear
from esper.kasmina.widths.widen import WidenKernel
from esper.printable import raised
from esper.surgery.isolation.contexts import same_randomness

TRUST = 0.3  # gradient matching: how far, in output scales, a candidate should move the output
AMPLITUDES = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # 0 is "do nothing", which competes in every race

FASTEST = 0.02  # learning rate of outgoing weights, at most
REACH = 0.3  # and at most this over the number of weights that feed one output
RELATIVE = 0.05  # learning rate of incoming weights, in their own root mean square
RIDGE = 0.01  # of the mean feature power

Run = Callable[[], Tensor]  # one training-mode pass to the scalar loss


class RaceState(TypedDict):
    """What a race remembers; tensors have one entry per candidate along axis 0."""

    units: int
    starts: list[str]
    batched: bool
    unbatched: NotRequired[str]  # likewise
    missed: NotRequired[int]  # absent in states of earlier versions
    scores: Tensor
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    optimizer: dict[str, Any]  # torch's own


class Race:
    """Candidates at one site.

    Args:
        layer: The site's layer, with open seams.
        units: Width of every candidate.
        starts: One per candidate: "svd" or "random".
        pool: Units for the "svd" candidates.
        x: Inputs of a kernel here, (batch, …); biases are centred on them.
        learning_rate: Learning rate of the candidates' own Adam, for their outgoing weights; None: by their
            number.
        peers: Other processes in which the same candidates learn from other batches.
    """

    def __init__(
        self,
        layer: KasminaLayer,
        units: int,
        starts: tuple[str, ...],
        pool: Survey,
        x: Tensor,
        learning_rate: float | None,
        peers: Peers = ALONE,
    ) -> None:
        self.layer, self.units, self.starts, self.peers = layer, units, starts, peers
        kernels = [self.candidate(i, start, pool, x) for i, start in enumerate(starts)]
        self.template = layer.place.kernel(units)
        self.parameters, self.buffers = stack_module_state(kernels)
        self.optimizer = torch.optim.Adam(self.groups(learning_rate))
        self.scores = torch.zeros(len(starts))  # each candidate's own loss at its last lesson
        self.unbatched = ""  # what was raised once the candidates did not run under vmap
        self.missed = 0  # lessons in which the pass left this site out, as stochastic depth does

    def candidate(self, index: int, start: str, pool: Survey, x: Tensor) -> LiveKernel:
        """Build one candidate; the first "svd" one takes the best units, the others draw by score."""
        kernel = self.layer.place.kernel(self.units).train()
        if start == "svd":
            sow(kernel, pool, best=index == 0)
        if isinstance(kernel, WidenKernel):
            centre(kernel, x)
        return kernel

    def groups(self, rate: float | None) -> list[dict[str, object]]:
        """Give outgoing weights, which start at zero, an absolute rate, and all others one relative to size.

        Adam moves every weight alike, so the output moves with the number of weights that feed it: the rate
        falls with it.

        An absolute rate kills rectified units where incoming weights are small: of 16 units on the digits CNN
        none was left after 16 steps at 0.05.
        """
        outgoing = self.template.outgoing
        fan_in = max(self.parameters[name][0, 0].numel() for name in outgoing)
        rate = min(FASTEST, REACH / fan_in) if rate is None else rate
        incoming = [t for name, t in self.parameters.items() if name not in outgoing and t.dim() > 2]
        relative = RELATIVE * float(rms(incoming[0].detach())) if incoming else rate
        rates = {name: rate if name in outgoing else relative for name in self.parameters}
        return [{"params": [tensor], "lr": rates[name]} for name, tensor in self.parameters.items()]

    def forward(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        """Run one candidate."""
        return functional_call(self.template, (parameters, buffers), (x,))

    def fit(self, x: Tensor, gradient: Tensor, scale: Tensor) -> None:
        """Match gradients in closed form: outgoing weights by ridge regression, behind a Linear consumer.

        Args:
            x: Inputs of the producer, (batch, …, in).
            gradient: Gradient of the loss for the consumer's output, (batch, …, out).
            scale: Root mean square of that output, 0-dim.
        """
        if not (isinstance(self.template, WidenKernel) and is_linear(self.layer.place.ends()[1])):
            return
        slope = gradient.flatten(0, -2)  # (rows, out)
        rows = slope.square().mean(1, keepdim=True).sqrt()  # (rows, 1)
        # No row is moved further than the trust: badly fitted ones took the loss from 0.13 to 4.9.
        target = -slope * (TRUST * scale / rows.clamp_min(rms(slope)))  # (rows, out)

        def features(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
            made = functional_call(self.template, (parameters, buffers), (x,), {"hidden": True})
            return made.flatten(0, -2)  # (batch, …, features) -> (rows, features)

        with torch.no_grad():
            # (candidates, rows, features)
            h = vmap(features, randomness="different")(self.parameters, self.buffers)
            wide = solvable(h)  # autocast may leave the gradient in half width
            h, target = h.to(wide), target.to(wide)
            gram = h.mT @ h  # (candidates, features, features)
            ridge = RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] + 1e-8
            gram = gram + ridge * torch.eye(gram.shape[-1], device=h.device, dtype=h.dtype)
            solved = torch.linalg.solve(gram, h.mT @ target)  # (candidates, features, out)
            self.parameters["consumer_weight"].copy_(solved.mT)  # (candidates, out, features)

    def learn_from_tap(self, tap: Tap, examples: int | None = None) -> None:
        """Match gradients: move the output a share of its scale down the gradient, without a pass."""
        if not tap.fresh():
            return
        assert tap.x is not None and tap.gradient is not None and tap.scale is not None
        x, gradient = tap.x[:examples], tap.gradient[:examples]
        target = -gradient * (TRUST * tap.scale / rms(gradient))  # (batch, …) as the consumer's output

        def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
            return (self.forward(parameters, buffers, x) - target).square().mean()

        if len(self.starts) == 1:  # vmap would cost more than the lesson
            (row,) = self.rows()
            alone = {name: row.pop(name) for name in self.parameters}
            losses = loss(alone, row).unsqueeze(0)  # (1,)
        else:
            losses = vmap(loss, randomness="different")(self.parameters, self.buffers)  # (candidates,)
        self.descend(losses, torch.autograd.grad(losses.sum(), list(self.parameters.values())))

    def learn_from_shadow(self, run: Run) -> None:
        """One step down the real loss behind the site."""
        own = list(self.parameters.values())
        losses = self.together(self.branch, run, self.stack)
        if losses is not None and (gradients := self.slopes(losses, own)) is not None:
            self.take(losses, gradients, bool(gradients))
            return
        found: list[Tensor] = []
        total: list[Tensor] = [torch.zeros_like(parameter) for parameter in own]
        passed = False
        for row in self.rows():
            # The gradient is taken while the branch is shown: a checkpointed host runs it again for that.
            with self.layer.showing(lambda x, row=row: self.branch(row, x)):
                loss = run()
                gradients = reached(loss, own)
            found.append(loss)
            total = [sum_ + gradient for sum_, gradient in zip(total, gradients or total, strict=True)]
            passed = passed or bool(gradients)
        self.take(torch.stack(found), total, passed)  # (candidates,), and as the parameters

    def take(self, losses: Tensor, gradients: Sequence[Tensor], passed: bool) -> None:
        """Take a lesson, or count it as missed where the pass has left the site out in every process."""
        if self.peers.all_ranks(not passed):
            self.missed += 1
            return
        gradients = gradients or [torch.zeros_like(parameter) for parameter in self.parameters.values()]
        self.descend(losses, gradients)

    def slopes(self, losses: Tensor, own: list[Tensor]) -> tuple[Tensor, ...] | None:
        """Return the gradients of a batched pass, none where it left the site out.

        Returns:
            None where a checkpointed host refuses.
        """
        try:
            return reached(losses.sum(), own)
        except RuntimeError as error:
            self.unbatched = raised(error)
            return None

    def descend(self, losses: Tensor, gradients: Sequence[Tensor]) -> None:
        """Step every candidate down its own loss, (candidates,); nothing else is updated."""
        losses = losses.detach()
        self.peers.all_reduce_mean([losses, *gradients])
        self.scores = torch.nan_to_num(losses.cpu(), nan=float("inf"))
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def batched(self) -> bool:
        """Whether the candidates run together."""
        return not self.unbatched

    @property
    def stack(self) -> dict[str, Tensor]:
        """All candidates' tensors, (candidates, …) each."""
        return {**self.parameters, **self.buffers}

    def rows(self) -> list[dict[str, Tensor]]:
        """Return each candidate's tensors alone."""
        return [{k: v[i] for k, v in self.stack.items()} for i in range(len(self.starts))]

    def branch(self, row: dict[str, Tensor], x: Tensor) -> Tensor:
        """Run one candidate from its row of the stack."""
        parameters = {k: row[k] for k in self.parameters}
        return self.forward(parameters, {k: row[k] for k in self.buffers}, x)

    def losses(self, run: Run) -> Tensor:
        """Return the loss of the run with each candidate added at full strength, (candidates,)."""
        return self.each(self.branch, run, self.stack)

    def each(
        self, branch: Callable[[dict[str, Tensor], Tensor], Tensor], run: Run, stack: dict[str, Tensor]
    ) -> Tensor:
        """Return the loss of the run with the branch added, once per row of the stack, (rows,)."""
        losses = self.together(branch, run, stack)
        if losses is not None:
            return losses
        rows = len(next(iter(stack.values())))
        return torch.stack([self.one(branch, run, {k: v[i] for k, v in stack.items()}) for i in range(rows)])

    def together(
        self, branch: Callable[[dict[str, Tensor], Tensor], Tensor], run: Run, stack: dict[str, Tensor]
    ) -> Tensor | None:
        """Return the same in one batched pass, or None where there is one row or it cannot be batched."""
        if not self.batched or len(next(iter(stack.values()))) == 1:
            return None
        try:
            with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no batching rule and warn of it
                return vmap(partial(self.one, branch, run), randomness="same")(stack)
        except RuntimeError as error:  # raised once more by a candidate alone where it is the loss's own
            self.unbatched = raised(error)
            return None

    def one(
        self, branch: Callable[[dict[str, Tensor], Tensor], Tensor], run: Run, row: dict[str, Tensor]
    ) -> Tensor:
        """Return the loss of the run with one branch added."""
        with self.layer.showing(lambda x: branch(row, x)):
            return run()

    @torch.no_grad()
    def amplitudes(self, index: int, run: Run) -> Tensor:
        """Return the loss of one candidate with its output times each of ``AMPLITUDES``."""
        parameters = {k: v[index] for k, v in self.parameters.items()}
        scales = {"amplitude": torch.tensor(AMPLITUDES, device=next(iter(parameters.values())).device)}

        def scaled(scale: dict[str, Tensor], x: Tensor) -> Tensor:
            buffers = {k: v[index].clone() for k, v in self.buffers.items()}
            return self.forward(parameters, buffers, x) * scale["amplitude"].to(x.dtype)

        return self.each(scaled, run, scales)

    def kernel(self, index: int, amplitude: float) -> LiveKernel:
        """Take a candidate out as a live instance of its own."""
        with same_randomness():  # its first weights are drawn, only to be written over
            kernel = self.layer.place.kernel(self.units).train()
        with torch.no_grad():
            for name, tensor in [*kernel.named_parameters(), *kernel.named_buffers()]:
                tensor.copy_({**self.parameters, **self.buffers}[name][index])
            for name in kernel.outgoing:
                kernel.get_parameter(name).mul_(amplitude)
        return kernel

    def halve(self) -> None:
        """Go on with the better half, by the last lesson."""
        order = self.scores.argsort()[: (len(self.starts) + 1) // 2]  # (half of the candidates,)
        self.scores = self.scores[order]
        self.starts = tuple(self.starts[int(i)] for i in order)
        state = self.optimizer.state
        kept: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            kept[name] = parameter.detach()[order].clone().requires_grad_()
            state[kept[name]] = {
                k: v if v.dim() == 0 else v[order].clone() for k, v in state.pop(parameter, {}).items()
            }
        self.parameters = kept
        for group, parameter in zip(self.optimizer.param_groups, kept.values(), strict=True):
            group["params"] = [parameter]
        self.buffers = {k: v[order].clone() for k, v in self.buffers.items()}

    def state_dict(self) -> RaceState:
        """Everything a resumed race needs."""
        return {
            "units": self.units,
            "starts": list(self.starts),
            "batched": self.batched,
            "unbatched": self.unbatched,
            "missed": self.missed,
            "scores": self.scores.clone(),
            "parameters": {k: v.detach().clone() for k, v in self.parameters.items()},
            "buffers": {k: v.clone() for k, v in self.buffers.items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
        }

    def load_state_dict(self, state: RaceState) -> None:
        """Go on where the saved race was."""
        with torch.no_grad():
            for name, tensor in state["parameters"].items():
                self.parameters[name].copy_(tensor)
            for name, tensor in state["buffers"].items():
                self.buffers[name].copy_(tensor)
        self.unbatched = state.get("unbatched", "" if state["batched"] else "before it was saved")
        self.scores = state["scores"].clone()
        self.missed = state.get("missed", 0)
        self.optimizer.load_state_dict(state["optimizer"])


def reached(loss: Tensor, own: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of candidates' tensors; none where the pass did not come by any of them."""
    if not loss.requires_grad:
        return ()
    found = torch.autograd.grad(loss, own, allow_unused=True)
    if all(gradient is None for gradient in found):
        return ()
    pairs = zip(found, own, strict=True)
    return tuple(torch.zeros_like(tensor) if back is None else back for back, tensor in pairs)


def solvable(tensor: Tensor) -> torch.dtype:
    """Return the numbers to solve equations in: linear algebra knows none of half width."""
    return torch.promote_types(tensor.dtype, torch.float32)


def rms(tensor: Tensor) -> Tensor:
    """Return the root mean square, 0-dim and never zero; squares of half width would be."""
    return tensor.to(solvable(tensor)).square().mean().sqrt().clamp_min(1e-20)
