"""Run growth's own passes on a sharded model: inside, every rank has all weights and nothing communicates.

Evidence, races and surveys take gradients for a site's output, batch over candidates with ``vmap`` and run
under another mode. FSDP2's hooks would gather weights in the middle of each, so one rank that skips a pass
would leave the others waiting for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from esper.distributed.fsdp.private_api import quiet, states


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Give a sharded model all its weights for a while; a model that is not sharded is left as it is.

    Collective when it is entered, local from then on: ranks may run different passes inside, or none. Inside,
    parameters are plain tensors in the dtype they compute in, ``model.parameters()`` gives them, and under
    mixed precision inputs and outputs are cast as in training. Gradients that wait on parameters are left
    alone; what ``backward()`` puts on them inside is dropped. At the end the model is sharded as before and
    goes on as if nothing had happened. Graphs made inside do not outlive it: their weights are freed.

    Needs the memory of all weights once. What is written to parameters inside is lost.

    Args:
        model: Sharded by ``fully_shard``, in whole or in part, or not at all.

    Raises:
        SurgeryError: A pass is under way, or this torch's FSDP is not the one Esper knows.
    """
    with ExitStack() as back:
        for state in states(model):
            first = state._modules[0]
            if not all(group.is_unsharded for group in state._fsdp_param_groups):
                back.callback(first.reshard)
                first.unshard()
            back.enter_context(quiet(state))
        for parameter in model.parameters():
            back.callback(setattr, parameter, "grad", parameter.grad)
            parameter.grad = None
        yield
