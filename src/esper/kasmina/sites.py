"""Find the pairs that can be widened, and say of every other layer why it cannot.

A pair is a producing and a consuming layer with only channel-wise operations between. It is found by running the
model in train and in eval mode; it counts only where both agree.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from esper.contracts import Refusal, Site, WidenEdit, WidenPlan
from esper.errors import SiteError, nearest
from esper.kasmina.between import (
    ELEMENTWISE,
    REDUCE,
    RESHAPE,
    SPATIAL,
    BatchNorm,
    Depthwise,
    Flatten,
    GroupNorm,
    Replay,
    Step,
)
from esper.kasmina.recorder import Call, Recording, record
from esper.kasmina.seam import open_seam

Selector: TypeAlias = "str | re.Pattern[str] | type[nn.Module]"
Sites: TypeAlias = "Selector | Sequence[Selector] | Mapping[str, Selector | Sequence[Selector]]"

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, *CONVOLUTIONS)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Pair:
    """A site with the host's own modules at hand."""

    site: Site
    producer: Any  # nn.Linear or a convolution
    consumer: Any
    steps: tuple[Step, ...]
    columns: int  # consumer columns per unit: 1, or positions per channel behind a flatten
    places: tuple[int, int]  # positions per example at which producer and consumer are applied
    step_flops: int  # forward, per example and unit, of what stands between

    def refreshed(self) -> Pair:
        """Return the pair with the facts of the layers as they are now, after this or a neighbour was widened."""
        parameters = weight_of(self.producer)[0].numel() + (self.producer.bias is not None)
        outgoing = weight_of(self.consumer)[:, : self.columns].numel()
        parameters += outgoing + sum(step.unit_parameters() for step in self.steps)
        incoming = weight_of(self.producer)[0].numel() * self.places[0]
        flops = 2 * (incoming + outgoing * self.places[1]) + self.step_flops
        site = replace(self.site, width=out_size(self.producer), unit_parameters=parameters, unit_flops=flops)
        return replace(self, site=site)

    def plan(self, units: int) -> WidenPlan:
        """Write down what grows when ``units`` are added; sources are the kernel's tensor names."""
        entry, exit_ = self.site.entry, self.site.exit
        edits = [edit(f"{entry}.weight", 0, self.producer.weight, units, "producer_weight")]
        attributes = [(entry, out_name(self.producer), out_size(self.producer) + units)]
        if self.producer.bias is not None:
            edits.append(edit(f"{entry}.bias", 0, self.producer.bias, units, "producer_bias"))
        for index, step in enumerate(self.steps):
            for own, host in step.grows():
                edits.append(edit(host, 0, getattr(step.module, own), units, f"between_{index}_{own}"))  # type: ignore[attr-defined]
            attributes.extend(step.attributes(units))
        added = units * self.columns
        edits.append(edit(f"{exit_}.weight", 1, self.consumer.weight, added, "consumer_weight"))
        attributes.append((exit_, in_name(self.consumer), in_size(self.consumer) + added))
        return WidenPlan(self.site.name, units, tuple(edits), tuple(attributes))


def edit(name: str, axis: int, tensor: Any, added: int, source: str) -> WidenEdit:
    """Describe one tensor's growth."""
    return WidenEdit(name, axis, tensor.shape[axis], tensor.shape[axis] + added, source)


def out_name(layer: nn.Module) -> str:
    """Name the attribute that counts outputs."""
    return "out_features" if isinstance(layer, nn.Linear) else "out_channels"


def in_name(layer: nn.Module) -> str:
    """Name the attribute that counts inputs."""
    return "in_features" if isinstance(layer, nn.Linear) else "in_channels"


def out_size(layer: nn.Module) -> int:
    """Count outputs."""
    return int(getattr(layer, out_name(layer)))


def in_size(layer: nn.Module) -> int:
    """Count inputs."""
    return int(getattr(layer, in_name(layer)))


class _Refused(Exception):
    """A chain cannot be widened; the message is the reason."""


class Finder:
    """Follows each layer's output through one recording until a layer consumes it."""

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        self.recording = recording
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.owners: dict[str, list[str]] = {}  # parameter's first name -> modules that hold that tensor
        first = {id(t): n for n, t in [*model.named_parameters(), *model.named_buffers()]}
        for path, module in self.modules.items():
            for tensor in [*module._parameters.values(), *module._buffers.values()]:
                if tensor is not None:
                    self.owners.setdefault(first[id(tensor)], []).append(path)
        self.first = first

    def pair(self, name: str) -> Pair:
        """Return the pair that ``name`` produces for; raise the reason where there is none."""
        producer = self.modules[name]
        call = self.only_call(name)
        if getattr(producer, "groups", 1) != 1:
            raise _Refused(f"{name} is a grouped convolution")
        axis = len(call.shape or ()) - 1 if isinstance(producer, nn.Linear) else 1
        if isinstance(producer, CONVOLUTIONS) and len(call.shape or ()) != len(producer.kernel_size) + 2:
            raise _Refused(f"{name} runs on input without a batch axis")
        steps: list[Step] = []
        flops = 0
        granularity = 1
        value = call.makes[0]
        while True:
            reader = self.only_reader(value, name)
            following = self.layer_of(reader)
            if following is not None and not is_depthwise(following[1]):
                return self.close(name, following, reader, steps, axis, flops, granularity, value)
            step, axis = self.step(reader, value, axis, name)
            if isinstance(step, GroupNorm):
                granularity = math.lcm(granularity, step.group)
            if reader.shape is not None:
                flops += step.unit_flops(reader.shape)
            steps.append(step)
            value = reader.makes[0]

    def only_call(self, name: str) -> Call:
        """Return the one call of a layer; refuse layers that are shared, altered or read elsewhere."""
        module = self.modules[name]
        if parametrize.is_parametrized(module) or not isinstance(
            module._parameters.get("weight"), nn.Parameter
        ):
            raise _Refused(f"the weight of {name} is parametrised")
        calls: set[int] = set()
        for own in ("weight", "bias"):
            tensor = module._parameters.get(own)
            if tensor is None:
                continue
            first = self.first[id(tensor)]
            if len(self.owners[first]) > 1:
                raise _Refused(
                    f"{name}.{own} is tied to {', '.join(o for o in self.owners[first] if o != name)}"
                )
            calls.update(self.recording.uses.get(first, []))
        if not calls:
            raise _Refused(f"{name} was not called by the probe")
        if len(calls) > 1:
            names = ", ".join(sorted({self.recording.calls[c].name for c in calls}))
            raise _Refused(f"{name} is called {len(calls)} times, or its weight is read elsewhere ({names})")
        call = self.recording.calls[calls.pop()]
        if call.name not in {"linear", "conv1d", "conv2d", "conv3d"}:
            raise _Refused(f"the weight of {name} is read by {call.name}, not by the layer itself")
        return call

    def only_reader(self, value: int, name: str) -> Call:
        """Return the one call that reads a value."""
        readers = sorted(set(self.recording.readers.get(value, [])))
        if value in self.recording.outputs:
            raise _Refused(f"the output of {name} is an output of the model")
        if not readers:
            raise _Refused(f"nothing the probe recorded reads the output of {name}")
        if len(readers) > 1:
            names = ", ".join(self.recording.calls[r].name for r in readers)
            raise _Refused(f"the output of {name} has {len(readers)} consumers ({names})")
        return self.recording.calls[readers[0]]

    def layer_of(self, call: Call) -> tuple[str, nn.Module] | None:
        """Return the Linear or convolution a call belongs to."""
        for parameter in call.parameters:
            path, _, own = parameter.rpartition(".")
            if (
                own == "weight"
                and isinstance(self.modules.get(path), LAYERS)
                and call.name in {"linear", "conv1d", "conv2d", "conv3d"}
            ):
                return path, self.modules[path]
        return None

    def close(
        self,
        name: str,
        following: tuple[str, nn.Module],
        call: Call,
        steps: list[Step],
        axis: int,
        flops: int,
        granularity: int,
        value: int,
    ) -> Pair:
        """Check the consumer and build the pair."""
        target, consumer = following
        self.only_call(target)
        producer = self.modules[name]
        shape = self.recording.shapes[value]
        if isinstance(consumer, nn.Linear) and axis != len(shape) - 1:
            raise _Refused(f"{target} reads another axis than the one {name} widens")
        if isinstance(consumer, CONVOLUTIONS):
            if axis != 1 or consumer.groups != 1:
                raise _Refused(f"{target} is grouped, or reads another axis than the one {name} widens")
            if consumer.padding_mode != "zeros" and steps and steps[-1].label == "pad":
                steps = steps[:-1]  # the consumer's own padding, which its slice repeats
        if producer is consumer:
            raise _Refused(f"{name} feeds itself")
        site = Site(
            name=f"{name}>{target}",
            kind="pair",
            entry=name,
            exit=target,
            between=tuple(s.label for s in steps),
            width=out_size(producer),
            granularity=granularity,
            unit_parameters=0,
            unit_flops=0,
        )
        columns = in_size(consumer) // out_size(producer)
        places = positions(self.only_call(name), producer), positions(call, consumer)
        return Pair(site, producer, consumer, tuple(steps), columns, places, flops).refreshed()

    def step(self, call: Call, value: int, axis: int, name: str) -> tuple[Step, int]:
        """Turn a call into a step, with the axis the channels are on behind it."""
        before, after = self.recording.shapes[value], call.shape
        others = [r for r in call.reads if r != value]
        if others or not call.makes or after is None:
            raise _Refused(f"the output of {name} meets another tensor in {call.name}")
        if call.parameters:
            return self.layered(call, axis, name), axis
        kwargs = {k: v for k, v in call.kwargs.items() if not isinstance(v, Tensor)}
        args = tuple(a for a in call.args if not isinstance(a, Tensor))
        if call.name in RESHAPE:
            if tuple(before) == tuple(after):
                return Replay("clone", torch.clone), axis
            if axis == 1 and len(after) == 2 and after[0] == before[0] and after[1] == math.prod(before[1:]):
                return Flatten("flatten"), 1
            raise _Refused(f"{call.name} {tuple(before)} -> {tuple(after)} mixes the channels of {name}")
        if call.name in ELEMENTWISE and before == after:
            return Replay(call.name, call.func, args, kwargs, "training" in kwargs), axis
        if call.name in SPATIAL and axis == 1 and len(before) > 2 and before[:2] == after[:2]:
            return Replay(
                call.name, call.func, args, kwargs, call.name.startswith(("dropout", "feature"))
            ), axis
        if call.name in REDUCE and axis == 1 and before[:2] == after[:2]:
            return Replay(call.name, call.func, args, kwargs), axis
        raise _Refused(f"{call.name} over the output of {name} does not treat every channel alone")

    def layered(self, call: Call, axis: int, name: str) -> Step:
        """Turn a call that owns parameters into a step."""
        path = call.parameters[0].rpartition(".")[0]
        module = self.modules.get(path)
        label = f"{type(module).__name__} {path}"
        owned = tuple(
            n
            for n in ("weight", "bias", "running_mean", "running_var")
            if getattr(module, n, None) is not None
        )
        if any(len(self.owners[p]) > 1 for p in call.parameters):
            raise _Refused(f"{path} between {name} and its consumer shares its tensors")
        if (
            axis == 1
            and isinstance(module, NORMS)
            and module.momentum is not None
            and call.name == "batch_norm"
        ):
            return BatchNorm(label, path, owned, module)
        if axis == 1 and isinstance(module, nn.GroupNorm) and call.name == "group_norm":
            return GroupNorm(label, path, owned, module)
        if axis == 1 and isinstance(module, CONVOLUTIONS) and is_depthwise(module):
            self.only_call(path)
            return Depthwise(label, path, owned, module)
        raise _Refused(
            f"{label} ({call.name}) stands between {name} and its consumer and mixes or owns channels"
        )


def weight_of(layer: nn.Module) -> Tensor:
    """Return a layer's weight, (out, in, …)."""
    return layer.weight  # type: ignore[return-value]


def positions(call: Call, layer: nn.Module) -> int:
    """Count the positions per example at which a layer is applied."""
    shape = call.shape or torch.Size()
    return math.prod(shape[1:-1]) if isinstance(layer, nn.Linear) else math.prod(shape[2:])


def is_depthwise(module: nn.Module) -> bool:
    """Tell a convolution that keeps every channel to itself."""
    return isinstance(module, CONVOLUTIONS) and module.groups == module.in_channels == module.out_channels > 1


def find_pairs(model: nn.Module, run: Callable[[], Any]) -> tuple[list[Pair], list[Refusal]]:
    """Run the model in train and in eval mode and return the pairs both agree on, and every refusal with its reason.

    Args:
        model: The host; its mode is put back.
        run: Calls the model once without touching training state; the caller guards buffers and random numbers.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.train()
        train = Finder(model, record(model, run))
        model.eval()
        with torch.no_grad():
            evaluation = Finder(model, record(model, run))
    finally:
        for module, mode in modes.items():
            module.training = mode
    pairs, refusals = [], []
    for name, module in model.named_modules():
        if not isinstance(module, LAYERS) or is_depthwise(module):
            continue
        try:
            pairs.append(agreed(train.pair(name), evaluation.pair(name)))
        except _Refused as refusal:
            refusals.append(Refusal(name, str(refusal)))
    return pairs, refusals


def reachable(
    model: nn.Module, pairs: Sequence[Pair], run: Callable[[], Any]
) -> tuple[list[Pair], list[Refusal]]:
    """Keep the pairs whose seams see every pass, in train mode and, without gradients, in eval mode.

    ``nn.TransformerEncoderLayer`` is why: its fast path calls neither of its Linear layers in evaluation, so a branch would
    be there in training and absent in evaluation.
    """
    modes = {module: module.training for module in model.modules()}
    kept, refusals = [], []
    for pair in pairs:
        seen = []
        try:
            for training in (True, False):
                witness = Witness()
                closers = (
                    open_seam(pair.producer, "entry", witness),
                    open_seam(pair.consumer, "exit", witness),
                )
                try:
                    model.train(training)
                    with torch.set_grad_enabled(training):
                        run()
                finally:
                    for close in closers:
                        close()
                seen.append(witness.seen)
        finally:
            for module, mode in modes.items():
                module.training = mode
        if seen == [["entry", "exit"]] * 2:
            kept.append(pair)
        else:
            mode = "training" if seen[0] != ["entry", "exit"] else "evaluation"
            refusals.append(
                Refusal(
                    pair.site.entry,
                    f"{pair.site.entry} and {pair.site.exit} are not called as modules in {mode}",
                )
            )
    return kept, refusals


class Witness:
    """Notes the order in which seams are passed."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def enter(self, x: Tensor) -> None:
        """Note the entry."""
        self.seen.append("entry")

    def leave(self, y: Tensor) -> Tensor:
        """Note the exit."""
        self.seen.append("exit")
        return y


def agreed(train: Pair, evaluation: Pair) -> Pair:
    """Return the pair both modes found."""
    if train.site != evaluation.site:
        raise _Refused(
            f"{train.site.entry} takes another path in eval mode: {describe(train)}, {describe(evaluation)}"
        )
    return train


def describe(pair: Pair) -> str:
    """Write a pair's path."""
    return " → ".join((pair.site.entry, *pair.site.between, pair.site.exit))


def select(pairs: Iterable[Pair], refusals: Sequence[Refusal], sites: Sites = "auto") -> list[Pair]:
    """Keep the pairs the user asked for.

    Args:
        pairs: What was found.
        refusals: Named in the error when nothing is left.
        sites: "auto", or globs, regular expressions or layer types (one or several) that match a pair's name or either
            of its layers; a mapping with "include" and "exclude" for both directions.

    Raises:
        SiteError: Nothing matches, or there is no pair at all.
    """
    found = list(pairs)
    if not found:
        listed = (
            "; ".join(f"{r.place}: {r.reason}" for r in refusals)
            or "the model has no Linear or convolution layer"
        )
        raise SiteError(
            f"no place to grow was found ({listed}). A pair of layers with only channel-wise operations between is needed"
        )
    include, exclude = (
        (sites.get("include", "auto"), sites.get("exclude", ()))
        if isinstance(sites, Mapping)
        else (sites, ())
    )
    chosen = [p for p in found if matches(p, include) and not (exclude != () and matches(p, exclude))]
    if not chosen:
        raise SiteError(
            f"sites={sites!r} matches none of the places found; {nearest(str(include), [p.site.name for p in found])}"
        )
    return chosen


def matches(pair: Pair, wanted: Selector | Sequence[Selector]) -> bool:
    """Tell whether a pair is meant by one of the selectors."""
    if isinstance(wanted, Sequence) and not isinstance(wanted, str):
        return any(matches(pair, one) for one in wanted)
    names = (pair.site.name, pair.site.entry, pair.site.exit)
    if isinstance(wanted, re.Pattern):
        return any(wanted.search(name) for name in names)
    if isinstance(wanted, type):
        return isinstance(pair.producer, wanted)
    return wanted == "auto" or any(fnmatch.fnmatchcase(name, wanted) for name in names)
