"""Blocks: layers, containers and spans of a Sequential, beside or behind which a blueprint's kernel can live.

Such places are found by running the model with a seam at every module, not by guessing (mechanics: a
``TransformerEncoderLayer`` calls none of its children in evaluation, ``MultiheadAttention.out_proj`` is never
called at all). A place must be passed exactly once, in train and in eval mode, with the batch on axis 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from esper.blueprints.graph import Graph
from esper.blueprints.kernel import GraphKernel
from esper.contracts import Refusal, Signature, Site
from esper.errors import BlueprintError
from esper.kasmina.branches.geometry import channels, signatures
from esper.kasmina.recording.flops import FlopMeter
from esper.surgery.isolation.contexts import same_modes
from esper.surgery.isolation.seam import Entering, open_seam

Ends = tuple[nn.Module, nn.Module]
Port = Literal["parallel", "serial"]
WIDEST = 4  # hidden width over channels up to which a price that is not linear is drawn as a line
GRANULES = (1, 2, 4, 8, 16)  # smallest hidden widths tried: attention needs a multiple of its heads
SILENT = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
NEVER = (*SILENT, nn.ModuleList, nn.ModuleDict, torch.jit.ScriptModule)


@dataclass(frozen=True)
class Block:
    """A site beside or behind modules of the host, and the blueprint that would grow there."""

    site: Site
    port: Port
    signature: Signature
    graph: Graph
    entry: nn.Module
    exit: nn.Module

    def ends(self) -> Ends:
        """Return the module whose input is tapped and the module whose output is added to."""
        return self.entry, self.exit

    def kernel(self, units: int) -> GraphKernel:
        """Build a fresh kernel with ``units`` as its hidden width, on the device of the place."""
        own = [*self.exit.parameters(), *self.entry.parameters()]
        return GraphKernel(self.graph.lower(self.signature, units), own[0])


@dataclass(slots=True, eq=False)  # seams tell gateways apart by identity
class Passage:
    """A gateway that notes what passes a place in one run."""

    order: str = ""  # "<>": entered once, left once
    x: Tensor | None = None
    version: int = 0
    y: Tensor | None = None
    unread: str = ""  # why a kernel cannot read the input

    def enter(self, x: Tensor | None) -> None:
        """Note the input."""
        self.order += "<"
        self.x, self.version = x, version_of(x)

    def leave(self, y: Tensor) -> Tensor:
        """Note the output."""
        self.order += ">"
        self.y = y
        if version_of(self.x) != self.version:
            self.unread = "its input is overwritten in place"
        return y


def version_of(x: Tensor | None) -> int:
    """Count how often a tensor was written to; 0 of one made in inference mode, which does not count."""
    return 0 if x is None or x.is_inference() else x._version


class Given:
    """Notes behind a module's own pre-hooks whether they gave it another input than it was called with.

    A seam stands before them and a branch that is kept behind: they have to read the same.
    """

    def __init__(self, passage: Passage) -> None:
        self.passage = passage

    def enter(self, x: Tensor | None) -> None:
        """Compare."""
        if x is not self.passage.x:
            self.passage.unread = "a forward pre-hook changes its input; do that in forward"

    def leave(self, y: Tensor) -> Tensor:
        """Let outputs pass."""
        return y


def find_blocks(
    model: nn.Module, run: Callable[[], object], examples: int, graphs: Sequence[Graph]
) -> tuple[list[Block], list[Refusal]]:
    """Return the places where blueprints fit, and every other place with the reason.

    Args:
        model: The host; its mode is put back.
        run: Function that calls the model once; the caller guards buffers and random numbers.
        examples: Examples in that run.
        graphs: Blueprints to offer.
    """
    ends = dict(places(model))
    with same_modes(model):
        model.train()
        train = walk(ends, run)
        model.eval()
        with torch.no_grad():
            evaluation = walk(ends, run)
    ahead = any(looks_ahead(passage) for passage in train.values())
    found: list[Block] = []
    refusals: list[Refusal] = []
    for name, two in ends.items():
        reason = refused(train[name], evaluation[name]) or refused_numbers(two)
        if reason is None:
            offered, reason = offers(name, two, train[name], examples, graphs, ahead)
            found.extend(offered)
        if reason is not None:
            refusals.append(Refusal(name, reason))
    return found, refusals


def places(model: nn.Module) -> Iterator[tuple[str, Ends]]:
    """List modules with parameters, and each layer of a Sequential with the activations behind it."""
    for name, module in model.named_modules():
        holds = next(module.parameters(), None) is not None
        own = name.endswith("_orig_mod")  # what torch.compile wraps is bound before a seam could step in
        if name and holds and not own and not isinstance(module, NEVER):
            yield name, (module, module)
        if isinstance(module, nn.Sequential):
            yield from spans(name, module)


def spans(prefix: str, sequential: nn.Sequential) -> Iterator[tuple[str, Ends]]:
    """List the spans from a layer to the last parameter-free child behind it."""
    children = list(sequential.named_children())
    for start, (name, layer) in enumerate(children):
        end = start
        while end + 1 < len(children) and carries_on(children[end + 1][1]):
            end += 1
        bare = next(layer.parameters(), None) is None or isinstance(layer, (*SILENT, torch.jit.ScriptModule))
        if end > start and not bare and end + 1 < len(children):
            yield f"{prefix}.{name}:{children[end][0]}".lstrip("."), (layer, children[end][1])


def carries_on(module: nn.Module) -> bool:
    """Tell a child that a span may reach to: it has no parameters, and a seam can step into its call."""
    return next(module.parameters(), None) is None and not isinstance(module, torch.jit.ScriptModule)


def walk(ends: Mapping[str, Ends], run: Callable[[], object]) -> dict[str, Passage]:
    """Run once with a gateway at every place."""
    passages = {name: Passage() for name in ends}
    closers: list[Callable[[], None]] = []
    try:
        for name, (entry, exit_) in ends.items():
            closers += [
                open_seam(entry, "entry", passages[name]),
                open_seam(exit_, "exit", passages[name]),
            ]
            if entry._forward_pre_hooks:
                behind = Entering(Given(passages[name]))
                closers.append(entry.register_forward_pre_hook(behind, with_kwargs=True).remove)
        run()
    finally:
        for close in closers:
            close()
    return passages


def looks_ahead(passage: Passage) -> bool:
    """Tell whether an early position of a sequence depends on a later one.

    Where no place does, the model may be causal, and a kernel that mixes all positions would show it what it
    is to predict.
    """
    x, y = passage.x, passage.y
    if x is None or y is None or not (x.dim() == y.dim() == 3 and x.shape[:2] == y.shape[:2]):
        return False
    if not (x.requires_grad and y.requires_grad and x.shape[1] > 1):
        return False
    (slope,) = torch.autograd.grad(y[:, 0].float().sum(), x, retain_graph=True, allow_unused=True)
    return slope is not None and bool(slope[:, 1:].any())


def refused(train: Passage, evaluation: Passage) -> str | None:
    """Return why a place cannot host a kernel, whatever its shape."""
    for passage, mode in ((train, "training"), (evaluation, "evaluation")):
        calls = passage.order.count("<")
        if calls == 0:
            return f"not called as a module in {mode}"
        if calls > 1:
            return f"called {calls} times in one pass in {mode}"
        if passage.order != "<>" or passage.y is None:
            return f"returns no floating-point tensor in {mode}"
        if passage.y.is_complex():
            return f"returns complex numbers in {mode}, which blueprints do not know"
        if not passage.y.is_floating_point():
            return f"returns no floating-point tensor in {mode}"
    assert train.y is not None and evaluation.y is not None
    if train.y.shape[1:] != evaluation.y.shape[1:]:
        return "its output has another shape in evaluation"
    return None


def refused_numbers(ends: Ends) -> str | None:
    """Return why no kernel could compute as a place does; a kernel takes its first parameter's type."""
    own = [parameter for end in reversed(ends) for parameter in end.parameters()]
    return "it computes with complex numbers, which blueprints do not know" if own[0].is_complex() else None


def offers(
    name: str, ends: Ends, passage: Passage, examples: int, graphs: Sequence[Graph], ahead: bool
) -> tuple[list[Block], str | None]:
    """Return what fits at one place, or why nothing does; ``ahead``: positions may see later ones."""
    assert passage.y is not None
    reasons: list[str] = []
    made: list[Block] = []
    fitting = signatures(ends, passage.x, passage.y, passage.unread, examples)
    for graph in graphs:
        for port in graph.ports:
            signature = fitting[port]
            misfit = signature if isinstance(signature, str) else graph.misfit(signature)
            if misfit is None and passage.y.dim() == 3 and graph.mixes == "all" and not ahead:
                misfit = "it mixes all positions, and no layer of this model lets one see a later one"
            if misfit is None and isinstance(signature, Signature):
                made.append(offer(name, ends, port, signature, graph, passage))
                break
            reasons.append(f"{graph.name}: {misfit}")
    return made, "; ".join(dict.fromkeys(reasons)) if not made else None


def offer(name: str, ends: Ends, port: Port, signature: Signature, graph: Graph, passage: Passage) -> Block:
    """Price a blueprint at a place: parameters and FLOPs of the first units and of one more."""
    granule = next((g for g in GRANULES if graph.scales and lowers(graph, signature, g)), 1)
    read = passage.y if port == "serial" or passage.x is None else passage.x
    assert read is not None
    sample = torch.empty(1, *read.shape[1:], device="meta")
    (small, cheap), (large, dear) = (cost(graph, signature, granule * n, sample) for n in (1, 2))
    unit = (large - small) // granule if graph.scales else small
    most = None if graph.scales else 1
    wide = granule * max(WIDEST * channels(read) // granule, 2)
    if graph.scales and (last_cost := cost(graph, signature, wide, sample)[0]) > small + unit * (
        wide - granule
    ):
        most = wide  # a price that grows with the width: the chord is never below it
        unit = -((small - last_cost) // (wide - granule))
    entry, _, rest = name.partition(":")
    last = f"{entry.rpartition('.')[0]}.{rest}".lstrip(".") if rest else entry
    site = Site(
        name=f"{name}+{graph.name}",
        kind="span" if rest else "module",
        entry=entry,
        exit=last,
        between=(),
        width=0,
        granularity=granule,
        unit_parameters=unit,
        unit_flops=(dear - cheap) // granule if graph.scales else cheap,
        blueprint=graph.name,
        base_parameters=max(small - unit * granule, 0),
        most=most,
    )
    return Block(site, port, signature, graph, *ends)


def lowers(graph: Graph, signature: Signature, hidden: int) -> bool:
    """Tell whether a blueprint can be built at this width."""
    try:
        graph.lower(signature, hidden)
    except BlueprintError:
        return False
    return True


def cost(graph: Graph, signature: Signature, hidden: int, sample: Tensor) -> tuple[int, int]:
    """Count parameters and forward FLOPs per example, without memory or time: on the meta device."""
    program = graph.lower(signature, hidden)
    with FlopMeter() as meter:
        program.run(sample, [torch.empty(weight.shape, device="meta") for weight in program.weights])
    return program.parameter_count(), meter.total
