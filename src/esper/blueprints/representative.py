"""Places that stand for all others: what the suite checks and benches measure a blueprint on."""

from __future__ import annotations

from esper.blueprints.graph import Graph
from esper.contracts import Signature

# Small and uneven on purpose: a transposed axis or a forgotten remainder shows.
PLACES = (
    Signature("vector", "parallel", 12, 8),
    Signature("vector", "serial", 12, 12),
    Signature("sequence", "parallel", 12, 8),
    Signature("sequence", "serial", 12, 12),
    Signature("image", "parallel", 8, 12),
    Signature("image", "serial", 8, 8),
    Signature("image", "parallel", 8, 12, (3, 3), (1, 1), (1, 1), (1, 1)),
    Signature("image", "parallel", 8, 12, (3, 3), (2, 2), (1, 1), (1, 1)),
    Signature("image", "parallel", 8, 12, (1, 1), (2, 2), (0, 0), (1, 1)),
    Signature("image", "parallel", 8, 12, (3, 3), (1, 2), (2, 2), (2, 2), padding_mode="reflect"),
    Signature("image", "parallel", 8, 12, (5, 3), (1, 1), (0, 1), (1, 1), groups=4),
    Signature("image", "parallel", 8, 8, (3, 3), (2, 2), (1, 1), (1, 1), groups=8, padding_mode="circular"),
)
HIDDEN = 6


def representative(graph: Graph) -> list[Signature]:
    """Return the places a blueprint fits."""
    return [place for place in PLACES if graph.misfit(place) is None]


def describe(signature: Signature) -> str:
    """Write a signature in a few words: ``image parallel 8→12, 3×3 /2``."""
    text = f"{signature.layout} {signature.port} {signature.inputs}→{signature.outputs}"
    if not signature.kernel_size:
        return text
    text += f", {_times(signature.kernel_size)} /{_times(signature.stride)} pad {_times(signature.padding)}"
    text += f" dilated {_times(signature.dilation)}" * (signature.dilation != (1, 1))
    text += f" groups {signature.groups}" * (signature.groups > 1)
    return text + f" {signature.padding_mode}" * (signature.padding_mode != "zeros")


def _times(pair: tuple[int, ...]) -> str:
    return "×".join(str(size) for size in pair) if len(set(pair)) > 1 or pair[0] > 2 else str(pair[0])
