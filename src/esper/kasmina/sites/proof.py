"""Prove on a copy what grows with the heads of attention, and how it is computed.

How a forward pass cuts its width into heads is the user's own code, so nothing is assumed: the copy is
widened and run, and what it computes has to be the old output plus what the kernel adds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import combinations, permutations, product, takewhile
from typing import TypeAlias

import torch
from torch import Tensor, nn

from esper.contracts import Site
from esper.kasmina.recording.recorder import Recording, Refused
from esper.kasmina.sites.attention import Found
from esper.kasmina.widths.heads import Count, HeadsPair
from esper.kasmina.widths.layers import out_size
from esper.surgery.isolation.contexts import slow_path
from esper.surgery.isolation.copies import stir
from esper.surgery.widen_layers import widen

Arguments: TypeAlias = "tuple[tuple[object, ...], dict[str, object]]"  # by position, and by name
Entered: TypeAlias = "dict[str, list[Arguments]]"  # calls of each module
TRIES = 33  # subsets of five numbers, and the ones whose name says heads


def around(names: Sequence[str]) -> list[str]:
    """List the modules that hold all these layers, from the model inwards."""
    levels = zip(*(name.split(".") for name in names), strict=False)
    shared = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, levels)]
    return [".".join(shared[:depth]) for depth in range(len(shared) + 1)]


def entered(recording: Recording, modules: Mapping[str, nn.Module], paths: Iterable[str]) -> Entered:
    """Run once more and note what each of these modules is called with."""
    calls: Entered = {}
    with ExitStack() as stack:
        for path in dict.fromkeys(paths):
            kept = calls.setdefault(path, [])

            def keep(
                module: nn.Module,
                args: tuple[object, ...],
                kwargs: dict[str, object],
                kept: list[Arguments] = kept,
            ) -> None:
                kept.append((args, kwargs))

            stack.callback(modules[path].register_forward_pre_hook(keep, with_kwargs=True).remove)
        assert recording.again is not None
        with slow_path():
            recording.again()
    return calls


class Proof:
    """Finds out by trying, on a copy, how attention is computed and what grows with its heads."""

    def __init__(self, model: nn.Module, pair: HeadsPair, run: Callable[[], object], heads: int) -> None:
        self.copy, self.pair, self.run, self.count = model.eval(), pair, run, heads
        self.x, self.y = self.look()

    @torch.no_grad()
    def look(self) -> tuple[Tensor, Tensor]:
        """Return what q reads and what the layer behind makes."""
        seen: list[Tensor] = []
        with ExitStack() as stack:
            first, last = self.pair.ends()

            def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                seen.append(args[0])

            def leave(module: nn.Module, args: object, y: Tensor) -> None:
                seen.append(y)

            stack.callback(first.register_forward_pre_hook(enter).remove)
            stack.callback(last.register_forward_hook(leave).remove)
            with slow_path():
                self.run()
        if len(seen) != 2:
            raise Refused(f"{self.pair.names[0]} and {self.pair.names[3]} are not called as modules")
        return seen[0], seen[1]

    def close(self, one: Tensor, other: Tensor) -> bool:
        """Compare within the rounding of two ways to add up."""
        allowed = 1e4 * torch.finfo(one.dtype).eps * float(one.abs().max())  # 1e-3 in fp32
        return one.shape == other.shape and float((one - other).abs().max()) <= allowed

    @torch.no_grad()
    def formula(self, pair: HeadsPair) -> HeadsPair:
        """Explain the host's own heads: looking ahead or not, which scale, and where q, k and v are."""
        size, width = pair.site.granularity, pair.site.width * pair.group
        scales = dict.fromkeys((size**-0.5, 1.0, width**-0.5, 1 / size))
        orders = list(permutations(range(3))) if pair.fused else [(0, 1, 2)]
        ways = product(scales, (False, True), orders, (False, True) if pair.fused else (False,))
        for scale, causal, (q, k, v), by_head in ways:
            tried = replace(pair, causal=causal, scale=scale, order=(q, k, v), by_head=by_head)
            if self.close(self.y, pair.consumer(tried.attend(*tried.parts(self.x), False))):
                return tried
        raise Refused(
            f"what {pair.names[3]} reads is not plain softmax attention, causal or not, of what is before it"
        )

    def heads(self, pair: HeadsPair) -> HeadsPair:
        """Find numbers of the user's modules whose growth makes the wider copy compute the new heads too."""
        size, width, group = pair.site.granularity, pair.site.width, pair.group
        numbers = {self.count * group: group, self.count: 1}
        known = {3 * width: 3 * size, width * group: size * group, width: size, **numbers}
        counts = [
            Count(path, module, name, known[value])
            for path, module in self.copy.named_modules()
            if not type(module).__module__.startswith("torch.nn.modules.")  # whose numbers no forward reads
            for name, value in vars(module).items()
            if type(value) is int and value in known and (pair.fused or value != 3 * width)
        ]
        counts.sort(key=lambda c: ("head" not in c.attribute or "dim" in c.attribute, c.per_head))
        named = tuple(
            c
            for c in counts
            if getattr(c.module, c.attribute) in numbers
            and "head" in c.attribute
            and "dim" not in c.attribute
        )
        tries = [c for number in range(len(counts) + 1) for c in combinations(counts, number)]
        why = ""
        for chosen in list(dict.fromkeys([named, *tries]))[:TRIES]:
            tried = replace(pair, counts=chosen)
            why = self.fails(tried, 1) or self.fails(tried, 2)
            if not why:
                return tried
        listed = ", ".join(f"{c.path}.{c.attribute}".lstrip(".") for c in counts) or "none"
        raise Refused(
            f"more heads in {pair.names[0]} do not fit the forward pass, whichever of its numbers grow "
            f"({listed}): {why}; write the inner width as heads * head_dim, or -1, and not as the input's"
        )

    @torch.no_grad()
    def fails(self, pair: HeadsPair, heads: int) -> str:
        """Widen the copy by random heads and say what is wrong; the copy is put back."""
        kernel = pair.kernel(heads * pair.site.granularity).eval()
        for parameter in kernel.parameters():
            parameter.normal_(std=0.5)
        plan = kernel.plan()
        wanted = self.y + kernel(self.x)
        widened = widen(self.copy, plan, kernel.slices(plan))
        try:
            _, y = self.look()
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            return (str(error).splitlines() or [type(error).__name__])[0]
        finally:
            widened.undo()
        return "" if self.close(wanted, y) else "the old heads change, or the new ones are not computed alone"


def heads_of(modules: Mapping[str, nn.Module], found: Found, calls: Entered) -> HeadsPair:
    """Prove on a copy what has to grow with the heads, and return the place.

    Raises:
        Refused: No growth of the user's own numbers gives what the kernel adds.
    """
    q, k, v, behind = found.names
    path = next((p for p in reversed(around(found.names)) if len(calls[p]) == 1), None)
    if path is None:
        raise Refused(f"no module around {', '.join(found.names)} is called exactly once")
    args, kwargs = calls[path][0]
    try:
        duplicate = copy.deepcopy(modules[path])
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise Refused(f"{path or 'the model'} cannot be copied for a proof: {error}") from error
    for parameter in duplicate.parameters():
        stir(parameter)
    first = len(path) + 1 if path else 0
    near = (q[first:], k[first:], v[first:], behind[first:])
    one, two, three, last = (duplicate.get_submodule(name) for name in near)
    width = out_size(one) // (3 if found.fused else found.group)
    between = ("attention",) if found.fused else (k, v, "attention")
    site = Site(f"{q}>{behind}", "pair", q, behind, between, width, width // found.heads, 0, 0)
    time, group = found.x.shape[1], found.group
    trial = HeadsPair(site, near, one, two, three, last, False, 1.0, found.dropout, (), time, group)
    proof = Proof(duplicate, trial, lambda: duplicate(*args, **kwargs), found.heads)
    trial = proof.heads(proof.formula(trial))
    counts = []
    for count in trial.counts:
        name = f"{path}.{count.path}".strip(".")
        counts.append(replace(count, path=name, module=modules[name]))
    one, two, three, last = (modules[name] for name in found.names)
    return replace(
        trial, names=found.names, producer=one, key=two, value=three, consumer=last, counts=tuple(counts)
    ).refreshed()
