"""Count floating-point operations by torch's own formulas: 2 per multiply-add, none for element-wise work."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypedDict

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from esper.kasmina.recording import fused

KINDS = "flash", "efficient", "cudnn"


def shared_heads(formula: Callable[..., int], first: int) -> Callable[..., int]:
    """Let a formula of torch's count attention whose heads share keys and values; before 2.12 it refuses.

    Args:
        formula: Function of the call's arguments to FLOPs.
        first: Index of the query among the arguments; key and value follow.
    """

    def count(*args: object, **kwargs: object) -> int:
        q, k, v = args[first : first + 3]  # (batch, heads, time, channels)
        if isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor) and q.dim() == 4:
            k, v = (one.new_empty((*q.shape[:2], *one.shape[2:]), device="meta") for one in (k, v))
        return formula(*args[:first], q, k, v, *args[first + 3 :], **kwargs)

    return count


def attention() -> dict[object, Callable[..., int]]:
    """List the formulas of attention; torch has none for its own on the CPU, which counted as free."""
    found = {}
    for kind in KINDS:
        name = f"_scaled_dot_product_{kind}_attention"
        for suffix, first in (("", 0), ("_backward", 1)):
            operator = getattr(torch.ops.aten, name + suffix)
            found[operator] = shared_heads(flop_registry[operator], first)
            if kind == "flash":  # the same sizes
                found[getattr(torch.ops.aten, f"{name}_for_cpu{suffix}")] = found[operator]
    return found


FORMULAS = {**fused.FORMULAS, **flop_registry, **attention()}


class FlopMeter(TorchDispatchMode):
    """Adds up the FLOPs of what runs inside it, backward passes and vmapped calls included.

    torch's ``FlopCounterMode`` also attributes them to modules, for which it hooks every one of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Count, then run; under inference mode layers come whole and are taken apart first."""
        if torch.is_inference_mode_enabled() and func._overloadpacket not in FORMULAS:
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        result = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


class LedgerState(TypedDict):
    """What a saved run remembers of its spending."""

    training_flops: int
    growth_flops: int
    seconds: float


class Ledger:
    """What a run has spent: FLOPs of the host's own training, and FLOPs of everything growth added."""

    def __init__(self, processes: int = 1) -> None:
        self.processes = processes  # each does the same work; all of it counts
        self.training_flops = 0
        self.growth_flops = 0
        self.seconds = 0.0  # spent in growth; reported, never decided on
        self.known: dict[Hashable, int] = {}

    @contextmanager
    def growth(self, *key: Hashable) -> Iterator[None]:
        """Charge what runs inside to growth; work of the same key costs the same and is metered once."""
        if key not in self.known:
            with FlopMeter() as meter:
                yield
            self.known[key] = meter.total
        else:
            yield
        self.grow(self.known[key])

    def train(self, flops: int) -> None:
        """Charge this process's part of the host's training."""
        self.training_flops += flops * self.processes

    def grow(self, flops: int) -> None:
        """Charge this process's part of growth."""
        self.growth_flops += flops * self.processes

    def state_dict(self) -> LedgerState:
        """Return the totals."""
        return {
            "training_flops": self.training_flops,
            "growth_flops": self.growth_flops,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: LedgerState) -> None:
        """Go on from saved totals."""
        self.training_flops, self.growth_flops = state["training_flops"], state["growth_flops"]
        self.seconds = state["seconds"]
