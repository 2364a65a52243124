"""Optimizers that torch does not ship: weights among their state, and tensors that they keep beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from esper.surgery.optimizers.kinds import kind_of

# What torch's own optimizers call their state: none of it is the weights, but for ASGD's average.
KNOWN = frozenset(
    "step exp_avg exp_avg_sq max_exp_avg_sq exp_inf momentum_buffer square_avg grad_avg acc_delta sum prev "
    "step_size eta mu ax mu_product variance row_var col_var".split()
)
ALIKE = 0.5  # cosine to the weights; of gradients it is near nought, of slow or averaged weights near one
DEPTH = 3  # containers in containers that are looked into
NESTS = (list, tuple, dict)


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


def forget_gradients(optimizer: Optimizer, scale: float) -> None:
    """Clear what an optimizer has gathered of weights that were scaled; its copies of these scale too."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            for one in parts_of(value, DEPTH):
                if not isinstance(one, Tensor):
                    continue
                if one.shape == getattr(parameter, "shape", None) and follows_weights(key, one, parameter):
                    one.mul_(scale)
                else:
                    one.zero_()


def kept_outside(optimizers: Mapping[str, Optimizer]) -> str:
    """Say which optimizer keeps something of its parameters' shapes where it cannot follow; "" for none."""
    for name, optimizer in optimizers.items():
        owned = [p for group in optimizer.param_groups for p in group["params"]]
        found = beside_state(optimizer, owned) or within_state(optimizer, owned)
        if found:
            return f"{type(optimizer).__name__} {name!r} keeps {found}"
    return ""


def beside_state(optimizer: Optimizer, owned: Sequence[Tensor]) -> str:
    """Say what an optimizer keeps beside its state: tensors as large as its parameters, or their shapes."""
    shapes, known = {p.shape for p in owned if p.numel() > 1}, {id(p) for p in owned}
    whole = sum(p.numel() for p in owned)  # all of them flattened into one
    for attribute, value in vars(optimizer).items():
        if attribute in {"state", "param_groups", "defaults"}:
            continue
        for one in parts_of(value, DEPTH):
            if isinstance(one, torch.Size) and one in shapes:
                return f"its parameters' shapes in .{attribute}, which do not grow; read them as it steps"
            if not isinstance(one, Tensor) or id(one) in known:
                continue
            if one.shape in shapes or (len(owned) > 1 and one.shape == (whole,)):
                return (
                    f"tensors as large as its parameters in .{attribute}, where they cannot grow with them; "
                    "keep them in self.state[parameter]"
                )
    return ""


def within_state(optimizer: Optimizer, owned: Sequence[Tensor]) -> str:
    """Say what an optimizer keeps in its state of which nobody can tell how it grows."""
    known = {id(p) for p in owned}
    if kind_of(optimizer).history:
        return ""
    for key, state in optimizer.state.items():
        if not isinstance(key, Tensor):
            if any(isinstance(one, Tensor) and one.numel() > 1 for one in parts_of(state, DEPTH)):
                return (
                    f"tensors in its state under {key!r}, which is no parameter, so nobody can tell how they "
                    "grow; keep them in self.state[parameter]"
                )
            continue
        for name, value in state.items() if id(key) in known and isinstance(state, dict) else ():
            if isinstance(value, NESTS) and any(misfit(one, key) for one in parts_of(value, DEPTH)):
                return (
                    f"a {type(value).__name__} of tensors as state {name!r} that are not of their "
                    "parameter's shape; only state with one number per weight can be widened: use another "
                    "optimizer for what may grow"
                )
    return ""


def misfit(one: object, parameter: Tensor) -> bool:
    """Tell a tensor that is neither of a parameter's shape nor a single number."""
    return isinstance(one, Tensor) and one.dim() > 0 and one.shape != parameter.shape


def parts_of(value: object, depth: int) -> Iterator[object]:
    """Yield the tensors and shapes in a nest of containers."""
    if isinstance(value, (Tensor, torch.Size)):
        yield value
    elif depth and isinstance(value, (*NESTS, set)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from parts_of(one, depth - 1)
