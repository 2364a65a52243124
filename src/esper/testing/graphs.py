"""Hypothesis strategies: random blueprints, valid with a place they fit, or spoilt with the culprit."""

from __future__ import annotations

import json
from dataclasses import dataclass

from esper.blueprints import dimensions
from esper.blueprints.graph import Graph, Layout, Node, node
from esper.blueprints.operators import OPERATORS, Constant
from esper.blueprints.sizes import PADDING_MODES
from esper.contracts import Signature
from esper.errors import MissingExtraError
from esper.testing.spoils import LAST, SPOILS

try:
    from hypothesis import strategies as st
except ImportError:
    raise MissingExtraError("hypothesis", "testing", "random blueprints") from None

__all__ = ["Fitting", "Spoilt", "nonsense", "signatures", "spoilt_graphs", "valid_graphs"]

LAYOUTS: tuple[Layout, ...] = ("vector", "sequence", "image")
ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "sigmoid")


@dataclass(frozen=True)
class Fitting:
    """A valid graph and a place it fits."""

    graph: Graph
    signature: Signature
    hidden: int


@dataclass(frozen=True)
class Spoilt:
    """A graph's text that must be refused, at the latest when it is built for the place.

    Attributes:
        node: The node the message must name; None where no node is to blame.
        reason: A part of the message.
    """

    text: str
    signature: Signature
    hidden: int
    node: str | None
    reason: str


@st.composite
def signatures(draw: st.DrawFn) -> Signature:
    """Draw a place."""
    layout = draw(st.sampled_from(LAYOUTS))
    inputs, outputs = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    if draw(st.booleans()):
        return Signature(layout, "serial", inputs, inputs)
    if layout != "image" or draw(st.booleans()):
        return Signature(layout, "parallel", inputs, outputs)
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    kernel, stride, dilation = (
        (draw(st.integers(1, most)), draw(st.integers(1, most))) for most in (4, 3, 2)
    )
    # Reflection takes less than one image; example sizes allow any padding below 5.
    padding = (draw(st.integers(0, 3)), draw(st.integers(0, 3)))
    mode = draw(st.sampled_from(PADDING_MODES))
    return Signature(
        layout, "parallel", groups * inputs, groups * outputs, kernel, stride, padding, dilation, groups, mode
    )


class _Growing:
    """A graph under construction: every new node reads the one before it, so that none is dead."""

    def __init__(self, draw: st.DrawFn, signature: Signature, hidden: int) -> None:
        self.draw, self.signature, self.hidden = draw, signature, hidden
        self.nodes: list[Node] = []
        self.widths = {"x": signature.inputs}  # of values at the present resolution
        self.now = "x"
        self.reduced = not signature.stride  # the image has the site's output size

    def add(self, op: str, *inputs: str, width: int | None, **attributes: Constant) -> str:
        """Append a node; without a width nothing but the next node may read it."""
        name = f"n{len(self.nodes)}"
        self.nodes.append(node(name, op, *inputs, **attributes))
        if width is not None:
            self.widths[name], self.now = width, name
        return name

    def dimension(self) -> tuple[dimensions.Dimension, int]:
        """Draw a width, and what it comes to here."""
        base: dimensions.Dimension = self.draw(st.sampled_from((*dimensions.SYMBOLS, 1, 4, 6)))
        if isinstance(base, str):
            base += self.draw(st.sampled_from(("", "*2", "//2", "*3//2", "*2*2")))
        site = self.signature
        known = {
            "inputs": site.inputs,
            "outputs": site.outputs,
            "groups": site.groups,
            "hidden": self.hidden,
        }
        return base, dimensions.resolve(base, known)

    def divisor(self, *widths: int) -> int:
        """Draw a number that divides every width."""
        return self.draw(st.sampled_from([n for n in range(1, 9) if all(width % n == 0 for width in widths)]))

    def partner(self) -> str:
        """Draw an earlier value that goes together with the present one."""
        width = self.widths[self.now]
        return self.draw(
            st.sampled_from([name for name, found in self.widths.items() if found in (width, 1)])
        )

    def project(self) -> None:
        """Add an affine map or, for images, a convolution."""
        given, width = self.dimension()
        if self.signature.layout != "image":
            self.add("affine", self.now, width=width, outputs=given, bias=self.draw(st.booleans()))
            return
        groups = self.divisor(self.widths[self.now], width)
        self.convolve(given, width, groups, "site" if self.draw(st.booleans()) else "same")

    def convolve(self, given: dimensions.Dimension, width: int, groups: int, geometry: str) -> None:
        """Add a convolution; the site's window is used once, where it changes the size."""
        before = self.now
        kernel, dilation = self.draw(st.sampled_from((1, 3, 5))), self.draw(st.integers(1, 2))
        if geometry == "site" and self.reduced and self.signature.stride:
            geometry = "same"
        self.add(
            "conv",
            before,
            width=width,
            channels=given,
            groups=groups,
            kernel=kernel,
            dilation=dilation,
            geometry=geometry,
        )
        if geometry == "site" and not self.reduced:
            self.reduced, self.widths = True, {self.now: width}  # earlier values have another size

    def step(self) -> None:
        """Add one node or one pattern."""
        here, width = self.now, self.widths[self.now]
        kinds = ["project", "activation", "norm", "add", "mul", "concat", "scale", "split", "softmax", "gate"]
        if self.signature.layout == "sequence":
            kinds += ["attention", "linear attention"]
        kind = self.draw(st.sampled_from(kinds))
        if kind == "project":
            self.project()
        elif kind == "activation":
            self.add(self.draw(st.sampled_from(ACTIVATIONS)), here, width=width)
        elif kind == "norm" and self.signature.layout == "image":
            self.add("group_norm", here, width=width, groups=self.divisor(width))
        elif kind == "norm":
            self.add("layer_norm", here, width=width)
        elif kind in ("add", "mul"):
            pair = [here, self.partner()]
            self.add(kind, *(reversed(pair) if self.draw(st.booleans()) else pair), width=width)
        elif kind == "concat":
            other = self.draw(st.sampled_from([*self.widths]))
            self.add("concat", here, other, width=width + self.widths[other])
        elif kind == "scale":
            self.add("scale", here, width=width, by=self.draw(st.sampled_from((-1, 0.5, 2.0))))
        elif kind == "split" and width > 1:
            parts = max(2, self.divisor(width))
            if width % parts == 0:
                index = self.draw(st.integers(0, parts - 1))
                self.add("split", here, width=width // parts, parts=parts, index=index)
        elif kind == "softmax":
            self.add("softmax", here, width=width, over="channels")
        elif kind == "gate":
            self.gate(here, width)
        elif kind == "attention":
            names = {"heads": self.divisor(width), "causal": self.draw(st.booleans())}
            self.add("attention", here, here, self.partner_of(width), width=width, **names)
        elif kind == "linear attention":
            turned = self.add("transpose", here, width=None)
            square = self.add("matmul", turned, self.partner_of(width), width=None)
            self.add("matmul", here, square, width=width)

    def partner_of(self, width: int) -> str:
        """Draw an earlier value of exactly this width."""
        return self.draw(st.sampled_from([name for name, found in self.widths.items() if found == width]))

    def gate(self, here: str, width: int) -> None:
        """Pool a value, and weigh it by what the pool says."""
        vector = self.signature.layout == "vector"
        over = "channels" if vector or self.draw(st.booleans()) else "positions"
        pooled = self.add(self.draw(st.sampled_from(("mean", "amax"))), here, width=None, over=over)
        gate = self.add("sigmoid", pooled, width=None)
        self.add("mul", here, gate, width=width)

    def finish(self) -> str:
        """Add the last affine, and perhaps what may follow it."""
        if self.signature.layout != "image":
            self.nodes.append(node(LAST, "affine", self.now, outputs="outputs"))
        elif self.reduced:
            self.nodes.append(node(LAST, "conv", self.now, channels="outputs", kernel=1))
        else:
            self.nodes.append(node(LAST, "conv", self.now, channels="outputs", geometry="site"))
        if self.draw(st.booleans()):
            self.nodes.append(node("after", "scale", LAST, by=0.5))
            return "after"
        return LAST


@st.composite
def valid_graphs(draw: st.DrawFn, steps: int = 8) -> Fitting:
    """Draw a graph of up to ``steps`` patterns with a place it fits."""
    signature, hidden = draw(signatures()), draw(st.integers(1, 7))
    growing = _Growing(draw, signature, hidden)
    for _ in range(draw(st.integers(0, steps))):
        if growing.widths[growing.now] > 128:
            break
        growing.step()
    output = growing.finish()
    nodes = draw(st.permutations(growing.nodes))
    graph = Graph("drawn", "drawn", "drawn", (signature.layout,), (signature.port,), tuple(nodes), output)
    return Fitting(graph, signature, hidden)


@st.composite
def spoilt_graphs(draw: st.DrawFn) -> Spoilt:
    """Draw a valid graph and spoil it in one way."""
    fitting = draw(valid_graphs())
    data = json.loads(fitting.graph.to_json())
    culprit, reason = draw(st.sampled_from(SPOILS))(data, fitting.signature)
    return Spoilt(json.dumps(data), fitting.signature, fitting.hidden, culprit, reason)


def nonsense() -> st.SearchStrategy[str]:
    """Draw JSON that has a graph's outline and arbitrary content: whatever happens, only one error may."""
    word = st.sampled_from(("x", "a", "b", "c", "", "hidden", "A", "if", *OPERATORS))
    value = st.one_of(
        word, st.integers(), st.floats(allow_nan=False), st.booleans(), st.none(), st.lists(st.integers())
    )
    names = [name for operator in OPERATORS.values() for name in operator.attributes]
    one = st.fixed_dictionaries(
        {"name": word, "op": st.sampled_from([*OPERATORS]), "inputs": st.lists(word, max_size=3)},
        optional={"attributes": st.dictionaries(st.sampled_from([*names, "name", "?"]), value, max_size=3)},
    )
    whole = st.fixed_dictionaries(
        {
            "name": word,
            "summary": word,
            "source": word,
            "layouts": st.lists(st.sampled_from(("vector", "sequence", "image", "?")), max_size=2),
            "ports": st.lists(st.sampled_from(("parallel", "serial", "?")), max_size=2),
            "nodes": st.lists(st.one_of(one, value), max_size=4),
            "output": word,
        },
        optional={"experimental": value, "?": value},
    )
    return st.one_of(whole, value).map(json.dumps)
