"""A blueprint: a small network as data, built for the tensors of a place by :meth:`Graph.lower`.

A graph holds names of whitelisted operators, never code. Widths are symbolic (``"hidden*2"``), so one
graph fits many places; the numbers of positions and examples stay open. It ends in one affine operator whose
weights start at zero, so that a newborn kernel adds exactly nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Literal

from esper.blueprints import dimensions, lowering, reading
from esper.blueprints.building import Constant
from esper.blueprints.operators import OPERATORS
from esper.blueprints.program import Program
from esper.blueprints.sizes import signature_fault
from esper.blueprints.structure import INPUT, Node, Structure, complete, examine, node
from esper.contracts import Signature
from esper.errors import BlueprintError

__all__ = ["INPUT", "Graph", "Node", "node"]

Layout = Literal["vector", "sequence", "image"]
Port = Literal["parallel", "serial"]
PROBE_HIDDEN = 16  # the width misfit tries


@dataclass(frozen=True, slots=True)
class Graph:
    """A blueprint; every instance is valid, because construction refuses what is not.

    Attributes:
        summary: Why it exists, in a sentence.
        source: The paper or code it comes from.
        nodes: In any order; the input is called ``x``.
        output: The node whose value is added to the site's output.
        experimental: It never won a benchmark yet.

    Raises:
        BlueprintError: The graph is not valid; the message names the node and the reason.
    """

    name: str
    summary: str
    source: str
    layouts: tuple[Layout, ...]
    ports: tuple[Port, ...]
    nodes: tuple[Node, ...]
    output: str
    experimental: bool = False
    structure: Structure = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "structure", examine(self.name, self.nodes, self.output))
        reading.check_header(self.name, self.summary, self.source, self.layouts, self.ports)

    @classmethod
    def from_json(cls, text: str) -> Graph:
        """Read what :meth:`to_json` wrote, or a person.

        Raises:
            BlueprintError: It is not JSON, not a graph, too large, or not valid.
        """
        data = reading.read(text)
        nodes = tuple(
            node(one["name"], one["op"], *one["inputs"], **one["attributes"]) for one in data["nodes"]
        )
        return cls(
            data["name"],
            data["summary"],
            data["source"],
            data["layouts"],
            data["ports"],
            nodes,
            data["output"],
            data["experimental"],
        )

    def to_json(self) -> str:
        """Return the canonical text: sorted keys, no spaces, nodes as they stand."""
        data = {
            "name": self.name,
            "summary": self.summary,
            "source": self.source,
            "layouts": self.layouts,
            "ports": self.ports,
            "nodes": [{**asdict(one), "attributes": dict(one.attributes)} for one in self.nodes],
            "output": self.output,
            "experimental": self.experimental,
        }
        return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)

    def digest(self) -> str:
        """Return the digest of what the graph computes and where it fits.

        Names of nodes, their listing order and left-out defaults make no difference; the order of a node's
        inputs does.
        """
        numbers = {INPUT: 0}
        steps = []
        for one in self.structure.order:
            steps.append([one.op, [numbers[name] for name in one.inputs], _plain(complete(one))])
            numbers[one.name] = len(numbers)
        facts = [sorted(self.layouts), sorted(self.ports), steps, numbers[self.output]]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def scales(self) -> bool:
        """Whether the graph has a free hidden width."""
        return any(
            "hidden" in dimensions.symbols(value)
            for one in self.nodes
            for name, value in one.attributes
            if OPERATORS[one.op].attributes[name].kind == "dimension" and isinstance(value, str)
        )

    @property
    def affine(self) -> bool:
        """Whether the output is an affine map of the input, so that it can be merged into a layer."""
        return all(OPERATORS[one.op].affine for one in self.nodes)

    @property
    def mixes(self) -> Literal["none", "past", "all"]:
        """Which other positions of a sequence an output can depend on; a causal host needs none or past."""
        return self.structure.mixes

    def misfit(self, signature: Signature) -> str | None:
        """Say why the graph does not fit a place; None if it does."""
        if signature.layout not in self.layouts:
            return f"{self.name} is for {' and '.join(self.layouts)} sites, not for {signature.layout} ones"
        if signature.port not in self.ports:
            return f"{self.name} has the port {' and '.join(self.ports)}, not {signature.port}"
        if fault := signature_fault(signature):
            return fault
        try:
            self.lower(signature, PROBE_HIDDEN)
        except BlueprintError as error:
            return str(error)
        return None

    def lower(self, signature: Signature, hidden: int) -> Program:
        """Build the graph for one signature.

        Args:
            signature: Tensors it must fit.
            hidden: Free width, in units; without effect where the graph does not scale.

        Raises:
            BlueprintError: The graph does not fit; the message names the node and the reason.
        """
        if isinstance(hidden, bool) or not isinstance(hidden, int) or not 1 <= hidden <= dimensions.LARGEST:
            raise BlueprintError(
                f"graph {self.name!r}: hidden must be a whole number in 1…{dimensions.LARGEST}, "
                f"not {hidden!r}"
            )
        if signature.layout not in self.layouts or signature.port not in self.ports:
            raise BlueprintError(f"graph {self.name!r}: {self.misfit(signature)}")
        return _lowered(self, signature, hidden)


@functools.lru_cache(maxsize=256)  # a race asks for the same program once per candidate and survey
def _lowered(graph: Graph, signature: Signature, hidden: int) -> Program:
    return lowering.lower(graph.name, graph.structure, graph.output, signature, hidden)


def _plain(attributes: dict[str, Constant]) -> dict[str, Constant]:
    """Write the same value in one way: ``"8"`` is 8."""
    return {
        name: int(value) if isinstance(value, str) and value.isdigit() else value
        for name, value in attributes.items()
    }
