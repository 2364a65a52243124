"""The first passes over a host run on copies: nobody knows yet what they change, and what they call."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from esper.surgery.isolation.attributes import COMPANIONS, MOVERS, Memo
from esper.surgery.isolation.copies import copied, on_copies
from esper.surgery.isolation.global_draws import draws_noted


@contextmanager
def at_first(model: nn.Module) -> Iterator[None]:
    """Run the first passes; note whether the model changes frozen parameters, as a moving average does."""
    with draws_noted(model), on_copies(model) as changed:
        yield
        frozen = {name for name, one in model.named_parameters() if not one.requires_grad}
        if frozen and frozen.intersection(changed()):
            MOVERS.add(model)


@contextmanager
def companions_noted(model: nn.Module) -> Iterator[None]:
    """Run a loss for the first time; note modules outside the model that it calls, a head of its own, say.

    Its norms would count Esper's batches; it is left as it is, now and in every later pass.
    """
    outside = Outside(model)
    hook = register_module_forward_pre_hook(outside)  # for all modules there are: told apart by the thread
    try:
        yield
    finally:
        hook.remove()
        outside.leave()


class Outside:
    """A hook that puts modules outside a model on copies before this thread calls them for the first time."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.thread = model, threading.get_ident()
        self.inside = {id(module) for module in model.modules()}
        self.called: list[tuple[nn.Module, dict[str, object]]] = []
        self.memo: Memo = {}

    def __call__(self, module: nn.Module, args: object) -> None:
        """Take in a module, in the mode the model is in."""
        if threading.get_ident() != self.thread or id(module) in self.inside:
            return
        self.inside.add(id(module))
        self.called.append((module, module.__dict__))
        module.__dict__ = copied(module.__dict__, self.memo)
        module.training = self.model.training

    def leave(self) -> None:
        """Give all of them back what they hold, and remember them."""
        for module, held in self.called:
            module.__dict__ = held
        if self.called:
            known = {id(one()): one for one in COMPANIONS.get(self.model, ())}
            known |= {id(one): weakref.ref(one) for one, _ in self.called}
            COMPANIONS[self.model] = list(known.values())
