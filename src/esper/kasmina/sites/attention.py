"""Recognise attention in a recorded run: three layers, softmax between them, one layer behind.

What a kernel could not repeat for new heads alone is refused by name: rotary embeddings, a bias per head, a
mask from outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper.kasmina.recording.recorder import OPERATORS, Call, Recording, Refused
from esper.kasmina.widths.layers import is_linear, out_size

PRODUCTS = frozenset({"matmul", "__matmul__", "bmm", "baddbmm", "einsum"})
FUSED = "scaled_dot_product_attention"
CORES = frozenset({"softmax", "_softmax", FUSED})
SHAPING = frozenset(
    "view reshape flatten unflatten transpose permute swapaxes movedim contiguous clone expand squeeze "
    "unsqueeze __get__ mT chunk split tensor_split unbind __getitem__ select narrow repeat_interleave".split()
)
INNER = frozenset(
    "mul __mul__ __rmul__ mul_ div __truediv__ div_ softmax _softmax dropout float to type_as".split()
)
MASKS = frozenset("masked_fill masked_fill_ add __add__ add_ __iadd__ where".split())


@dataclass(frozen=True)
class Found:
    """Attention as the recording shows it."""

    names: tuple[str, str, str, str]
    x: Tensor
    heads: int  # of k and v
    dropout: float
    group: int = 1  # query heads that share one of k and v

    @property
    def fused(self) -> bool:
        """One layer makes q, k and v."""
        return self.names[0] == self.names[1]


def attentions(recording: Recording, modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, Behind]]:
    """Map every layer whose output goes into attention to the layer behind and the way between."""
    if not any(call.name in CORES for call in recording.calls):
        return {}  # nothing attends: a walk back from every layer would be quadratic in a deep residual net
    seen: dict[str, tuple[str, Behind]] = {}
    for index, call in enumerate(recording.calls):
        path = layer_of(call, modules)
        if path is None or not is_linear(modules[path]):
            continue
        behind = Behind(recording, modules, call)
        if behind.is_attention() and index > max(behind.sources.values(), default=index):
            for name in behind.sources:
                seen.setdefault(name, (path, behind))
    return seen


def layer_of(call: Call, modules: Mapping[str, nn.Module]) -> str | None:
    """Name the layer a call belongs to."""
    if call.name not in OPERATORS:
        return None
    paths = [p.rpartition(".")[0] for p in call.parameters if p.endswith("weight")]
    return next((p for p in paths if p in modules), None)


class Behind:
    """What lies behind the input of a layer, back to the layers before it."""

    def __init__(self, recording: Recording, modules: Mapping[str, nn.Module], call: Call) -> None:
        self.recording, self.modules = recording, modules
        self.sources: dict[str, int] = {}  # layer -> its call
        self.core: Call | None = None  # softmax, or torch's own attention
        self.path: list[Call] = []  # what stands on the way from those layers, newest first
        self.masks: list[Call] = []  # what does not come from them
        self.given = False  # something came from outside the pass
        self.memory: dict[int, frozenset[str]] = {}
        for value in call.reads:
            self.walk(value)

    def walk(self, value: int) -> None:
        """Note the layers a value comes from; a residual stream may lead through thousands of sums."""
        todo, entered = [value], set[int]()
        while todo:
            value = todo[-1]
            if value in self.memory or self.ends(value):
                todo.pop()
                continue
            call = self.recording.calls[self.recording.makers[value]]
            if value not in entered and call.name in CORES:
                self.core = call
            entered.add(value)
            if waiting := [read for read in call.reads if read not in self.memory]:
                todo.extend(reversed(waiting))
                continue
            layers = frozenset[str]().union(*(self.memory[read] for read in call.reads))
            self.memory[value] = layers
            (self.path if layers else self.masks).append(call)
            todo.pop()

    def ends(self, value: int) -> bool:
        """Note a value that is not followed further back: a layer's, a norm's, or one from outside."""
        maker = self.recording.makers.get(value)
        if maker is None:
            self.given = True
            self.memory[value] = frozenset()
            return True
        call = self.recording.calls[maker]
        source = layer_of(call, self.modules)
        if source is None:
            learned = call.name not in MASKS and any(is_learned(self.modules, p) for p in call.parameters)
            if not (call.reads and learned):
                return False
            source = f"({call.name})"  # a norm or an embedding: what is before it does not matter
        self.sources[source] = maker
        self.memory[value] = frozenset({source})
        return True

    def is_attention(self) -> bool:
        """Tell attention from a softmax alone: what comes from layers meets what comes from layers."""
        products = [call.reads[:2] for call in self.path if call.name in PRODUCTS]
        met = [reads for reads in products if all(self.memory[read] for read in reads)]
        return self.core is not None and (self.core.name == FUSED or len(met) > 1)

    def roles(self) -> tuple[str, str, str]:
        """Tell q, k and v by the products they go into."""
        q = k = v = ""
        for call in self.path:
            read = [self.memory[r] for r in call.reads]
            if call.name == FUSED and len(read) >= 3 and all(len(r) == 1 for r in read[:3]):
                q, k, v = (next(iter(r)) for r in read[:3])
            elif call.name in PRODUCTS and len(read) >= 2:
                if len(read[0]) == len(read[1]) == 1 and read[0] != read[1]:
                    (q,), (k,) = read[0], read[1]
                elif len(read[0]) == 2 and len(read[1]) == 1:
                    (v,) = read[1]
        return q, k, v

    def found(self, path: str) -> Found:
        """Say which layers play which role; refuse what a kernel could not repeat."""
        named = ", ".join(self.sources)
        if len(self.sources) == 1 and named in self.modules:
            return self.counted(path, (named,) * 3, 3, 1)
        if len(self.sources) != 3 or any(n not in self.modules for n in self.sources):
            raise Refused(f"the attention before {path} reads {named}; q, k and v as three layers are needed")
        q, k, v = self.roles()
        if {q, k, v} != set(self.sources):
            raise Refused(f"q, k and v of the attention before {path} cannot be told apart ({named})")
        calls = [self.recording.calls[self.sources[n]] for n in (q, k, v)]
        if len({call.reads[:1] for call in calls}) > 1:
            raise Refused(f"{q}, {k} and {v} read different inputs (cross-attention); a kernel sees only one")
        wide, *few = (out_size(self.modules[n]) for n in (q, k, v))
        if few[0] != few[1] or wide % few[0]:
            raise Refused(f"{q}, {k} and {v} have widths that do not fit ({wide}, {few[0]}, {few[1]})")
        return self.counted(path, (q, k, v), 1, wide // few[0])

    def counted(self, path: str, names: tuple[str, str, str], parts: int, group: int) -> Found:
        """Count the heads; ``parts`` of the first layer's width are q, k and v."""
        self.check(path)
        first = names[0]
        x = self.recording.calls[self.sources[first]].argument(0, "input")
        if not isinstance(x, Tensor) or x.dim() != 3:
            raise Refused(f"{first} does not read (batch, time, channels)")
        assert self.core is not None
        shape, width = self.core.shape or torch.Size(), out_size(self.modules[first])
        heads = shape[1] if len(shape) == 4 else shape[0] // len(x) if len(shape) == 3 else 0
        if heads < 1 or heads % group or width % (heads * parts):
            raise Refused(
                f"the heads of the attention before {path} cannot be counted from {tuple(shape)}; {first} "
                f"makes {width} channels, and new heads need q, k and v of one width in it or three layers"
            )
        return Found((*names, path), x, heads // group, self.dropout(), group)

    def check(self, path: str) -> None:
        """Refuse operations and masks that a kernel could not repeat."""
        for call in self.path:
            masked = call.name in MASKS and sum(bool(self.memory[r]) for r in call.reads) == 1
            known = call.name in SHAPING | PRODUCTS | {FUSED} or (call.name in INNER and len(call.reads) == 1)
            if not (known or masked):
                raise Refused(
                    f"{call.name} stands in the attention before {path}; new heads can repeat scaling, masks "
                    "made in the pass, softmax and dropout only (no rotary embeddings, no bias per head)"
                )
        learned = [p for c in (*self.masks, *self.path) for p in c.parameters if is_learned(self.modules, p)]
        if learned:
            raise Refused(f"{learned[0]} is added to the scores before {path}; new heads would have none")
        if self.given:
            raise Refused(
                f"the attention before {path} gets a mask from outside, which a kernel does not see"
            )

    def dropout(self) -> float:
        """Return the share of attention weights that is dropped in training."""
        rates = [call.argument(1, "p", 0.5) for call in self.path if call.name == "dropout"]
        rates += [call.argument(4, "dropout_p", 0.0) for call in self.path if call.name == FUSED]
        return float(max(rates, default=0.0))


def is_learned(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Tell a parameter from a buffer."""
    path, _, leaf = name.rpartition(".")
    return leaf in modules[path]._parameters
