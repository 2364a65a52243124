"""Training without dropout: one form of a function draws other masks than another, and both are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from torch import nn
from torch.overrides import TorchFunctionMode

# By name, since functional, torch and method forms share it: where the share that is dropped stands.
SHARES = {
    "dropout": 1,
    "dropout_": 1,
    "dropout1d": 1,
    "dropout2d": 1,
    "dropout3d": 1,
    "alpha_dropout": 1,
    "alpha_dropout_": 1,
    "feature_dropout": 1,
    "feature_dropout_": 1,
    "feature_alpha_dropout": 1,
    "feature_alpha_dropout_": 1,
}
ATTENTION = "scaled_dot_product_attention"  # (q, k, v, mask, dropout_p)


class Still(TorchFunctionMode):
    """Lets every dropout call drop nothing.

    Attributes:
        met: Whether there was one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.met = False

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Run a call, with a share of zero where it would drop."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in SHARES:
            self.met = True
            args, kwargs = with_zero(args, kwargs, SHARES[name], "p")
        elif name == ATTENTION:
            self.met = True
            args, kwargs = with_zero(args, kwargs, 4, "dropout_p")
        return func(*args, **kwargs)


def with_zero(
    args: tuple[object, ...], kwargs: dict[str, object], index: int, name: str
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Set an argument, given by position or by name, to zero."""
    if len(args) > index:
        return (*args[:index], 0.0, *args[index + 1 :]), kwargs
    return args, {**kwargs, name: 0.0}


@contextmanager
def still(model: nn.Module, listens: bool = True) -> Iterator[Still]:
    """Let nothing be dropped, between the layers of recurrent ones either.

    Args:
        model: Model that is trained.
        listens: False where its passes are known to call no dropout: to look at every call takes a while.
    """
    recurrent = [(module, module.dropout) for module in model.modules() if isinstance(module, nn.RNNBase)]
    try:
        for module, _ in recurrent:
            module.dropout = 0.0
        mode = Still()
        with mode if listens else nullcontext():
            yield mode
    finally:
        for module, share in recurrent:
            module.dropout = share
