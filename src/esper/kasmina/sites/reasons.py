"""Why modules of other kinds cannot be widened, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from esper.contracts import Refusal
from esper.kasmina.widths.layers import is_depthwise
from esper.kasmina.widths.places import Place, WidenPlace

FOLLOWS = (
    "a depthwise convolution keeps every channel to itself, so it becomes wider with the layer in front of "
    "it only, and that one is no place"
)
CELLS = (
    "a {kind} is called once per position, by a loop of your own that also makes its first state; {layer} "
    "runs the loop itself, and its hidden size can grow"
)
WIDTH = (
    "the width of {an} {kind} is that of everything behind it; a Linear behind it, of its own width, can be "
    "widened"
)
REASONS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.LSTMCell, CELLS.format(kind="LSTMCell", layer="nn.LSTM")),
    (nn.GRUCell, CELLS.format(kind="GRUCell", layer="nn.GRU")),
    (nn.RNNCell, CELLS.format(kind="RNNCell", layer="nn.RNN")),
    (nn.EmbeddingBag, WIDTH.format(an="an", kind="EmbeddingBag")),
    (nn.Embedding, WIDTH.format(an="an", kind="Embedding")),
    (
        nn.Bilinear,
        "a Bilinear reads two inputs and a kernel sees only one; two Linear layers whose outputs are "
        "multiplied can be widened",
    ),
    (
        nn.MultiheadAttention,
        "nn.MultiheadAttention fixes its width to embed_dim; q, k and v as Linear layers of your own, with "
        "scaled_dot_product_attention, have heads that can grow",
    ),
)


def why_not(module: nn.Module) -> str | None:
    """Return why a module that holds matrices of its own cannot be widened; None where it holds none."""
    matrices = [name for name, own in module._parameters.items() if own is not None and own.dim() > 1]
    if not matrices:
        return None
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript, whose code cannot be followed; the eager module it was made from can grow"
    named = next((reason for kind, reason in REASONS if isinstance(module, kind)), None)
    if named is not None:
        return named
    kind = type(module).__name__
    held = ", ".join(matrices)
    return (
        f"a {kind} is no Linear, convolution or recurrent layer of torch's own, and Esper cannot know what "
        f"its {held} does; write it with such layers to let it grow"
    )


def left_behind(model: nn.Module, found: Iterable[Place]) -> list[Refusal]:
    """Give a reason for every depthwise convolution that no place takes along."""
    plans = [place.plan(place.site.granularity) for place in found if isinstance(place, WidenPlace)]
    taken = {edit.name.rpartition(".")[0] for plan in plans for edit in plan.edits}
    return [
        Refusal(path, FOLLOWS)
        for path, module in model.named_modules()
        if is_depthwise(module) and path not in taken
    ]
