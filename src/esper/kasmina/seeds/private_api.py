"""What a kernel's pass asks torch that torch has no public answer to; read in torch 2.13."""

from __future__ import annotations

from functools import cache

import torch

from esper.private_torch import demand

READ_IN = "2.13"
TASK, TRACING = "_current_graph_task_id", "_get_tracing_state"
TRANSFORMS = "_are_functorch_transforms_active"


@cache
def _require_names() -> None:
    demand(torch._C, (TASK, TRACING, TRANSFORMS), READ_IN, "letting a kernel into a pass")


def on_the_way_back() -> bool:
    """Tell whether autograd runs this pass again, for a checkpoint.

    Raises:
        EsperError: This torch keeps it under another name.
    """
    _require_names()
    return bool(torch._C._current_graph_task_id() != -1)


def aloof() -> bool:
    """Tell whether torch compiles, traces or transforms the pass that is running.

    Raises:
        EsperError: This torch keeps it under another name.
    """
    if torch.compiler.is_compiling():
        return True
    _require_names()
    return bool(torch._C._are_functorch_transforms_active()) or torch._C._get_tracing_state() is not None
