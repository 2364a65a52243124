"""What a user does with a grown model, for a process in which Esper cannot be imported."""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def again(net: nn.Module) -> nn.Module:
    """Save a model and load it."""
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def compiled(net: nn.Module, x: Tensor) -> Any:
    """Compile a model; its graph must not break."""
    torch.compiler.reset()
    return torch.compile(net, backend="eager", fullgraph=not has_recurrent(net))(x)


def has_recurrent(net: nn.Module) -> bool:
    """Tell whether torch's compiler breaks the graph of a model by its own rules."""
    return any(isinstance(module, nn.RNNBase) for module in net.modules())


def trained(net: nn.Module, x: Tensor) -> Tensor:
    """Train a copy for a step; every parameter must get a gradient; return what the model says."""
    copied = copy.deepcopy(net).train()
    copied(x).square().sum().backward()
    assert all(one.grad is not None for one in copied.parameters())
    return net(x)


WAYS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "torch.load": lambda net, x: net(x),
    "save and load": lambda net, x: again(net)(x),
    "deepcopy": lambda net, x: copy.deepcopy(net)(x),
    "torch.export": lambda net, x: torch.export.export(net, (x,)).module()(x),
    "torch.compile": compiled,
    "torch.jit.trace": lambda net, x: torch.jit.trace(net, (x,))(x),
    "training": trained,
}


def tried(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Try every way on every model of a folder; what differs, or what it raises."""
    for file in sorted(folder.glob("*.pt")):
        x, expected, net = torch.load(file, weights_only=False)
        found: dict[str, str] = {}
        for name, way in WAYS.items():
            try:
                off = float((way(net, x) - expected).abs().max())
            except Exception as error:  # the table says which
                found[name] = f"{type(error).__name__}: {error}"
            else:
                found[name] = "" if off <= 1e-5 * float(expected.abs().max()) else f"differs by {off}"
        yield file.stem, found


def tell(folder: str) -> None:
    """Print what was found."""
    warnings.simplefilter("ignore")
    print(json.dumps(dict(tried(Path(folder)))))
