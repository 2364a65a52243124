"""Optimizers that torch does not ship: weights among their state, and tensors that they keep beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

# What torch's own optimizers call their state: none of it is the weights, but for ASGD's average.
KNOWN = frozenset(
    "step exp_avg exp_avg_sq max_exp_avg_sq exp_inf momentum_buffer square_avg grad_avg acc_delta sum prev "
    "step_size eta mu ax mu_product variance row_var col_var".split()
)
ALIKE = 0.5  # cosine to the weights; of gradients it is near nought, of slow or averaged weights near one
DEPTH = 3  # containers in containers that are looked into


def follows_weights(key: str, state: Tensor, weights: Tensor) -> bool:
    """Tell state that is a copy or an average of the weights, as look-ahead's slow ones are.

    Args:
        key: Name of the state; what torch itself keeps is known.
        state: Tensor in the optimizer's state, of the weights' shape.
        weights: Parameter the state belongs to.
    """
    if key in KNOWN or not state.is_floating_point():
        return False
    one, other = state.flatten().double(), weights.detach().flatten().double()  # (numbers,) each
    return float(torch.dot(one, other)) > ALIKE * float(one.norm() * other.norm()) > 0


def kept_outside(optimizers: Mapping[str, Optimizer]) -> str:
    """Say which optimizer keeps tensors like its parameters beside its state, where they cannot follow."""
    for name, optimizer in optimizers.items():
        owned = [p for group in optimizer.param_groups for p in group["params"]]
        shapes, known = {p.shape for p in owned if p.numel() > 1}, {id(p) for p in owned}
        for attribute, value in vars(optimizer).items():
            if attribute in {"state", "param_groups", "defaults"}:
                continue
            if any(one.shape in shapes and id(one) not in known for one in tensors_in(value, DEPTH)):
                return (
                    f"{type(optimizer).__name__} {name!r} keeps tensors as large as its parameters in "
                    f".{attribute}, where they cannot grow with them; keep them in self.state[parameter]"
                )
    return ""


def tensors_in(value: object, depth: int) -> Iterator[Tensor]:
    """Yield the tensors in a nest of containers."""
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (list, tuple, set, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(one, depth - 1)
