"""Follow a layer's output through a recorded run until a layer consumes it, or say why none does."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from esper.contracts import Site
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
from esper.kasmina.pairs import Pair, in_size, out_size
from esper.kasmina.recorder import Call, Recording

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, *CONVOLUTIONS)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
OPERATORS = frozenset({"linear", "conv1d", "conv2d", "conv3d"})


class Refused(Exception):
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
            raise Refused(f"{name} is a grouped convolution")
        axis = len(call.shape or ()) - 1 if isinstance(producer, nn.Linear) else 1
        if isinstance(producer, CONVOLUTIONS) and len(call.shape or ()) != len(producer.kernel_size) + 2:
            raise Refused(f"{name} runs on input without a batch axis")
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
            raise Refused(f"the weight of {name} is parametrised")
        calls: set[int] = set()
        for own in ("weight", "bias"):
            tensor = module._parameters.get(own)
            if tensor is None:
                continue
            first = self.first[id(tensor)]
            if len(self.owners[first]) > 1:
                raise Refused(
                    f"{name}.{own} is tied to {', '.join(o for o in self.owners[first] if o != name)}"
                )
            calls.update(self.recording.uses.get(first, []))
        if not calls:
            raise Refused(f"{name} was not called by the probe")
        if len(calls) > 1:
            names = ", ".join(sorted({self.recording.calls[c].name for c in calls}))
            raise Refused(f"{name} is called {len(calls)} times, or its weight is read elsewhere ({names})")
        call = self.recording.calls[calls.pop()]
        if call.name not in OPERATORS:
            raise Refused(f"the weight of {name} is read by {call.name}, not by the layer itself")
        return call

    def only_reader(self, value: int, name: str) -> Call:
        """Return the one call that reads a value."""
        readers = sorted(set(self.recording.readers.get(value, [])))
        if value in self.recording.outputs:
            raise Refused(f"the output of {name} is an output of the model")
        if not readers:
            raise Refused(f"nothing the probe recorded reads the output of {name}")
        if len(readers) > 1:
            names = ", ".join(self.recording.calls[r].name for r in readers)
            raise Refused(f"the output of {name} has {len(readers)} consumers ({names})")
        return self.recording.calls[readers[0]]

    def layer_of(self, call: Call) -> tuple[str, nn.Module] | None:
        """Return the Linear or convolution a call belongs to."""
        for parameter in call.parameters:
            path, _, own = parameter.rpartition(".")
            if own == "weight" and isinstance(self.modules.get(path), LAYERS) and call.name in OPERATORS:
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
            raise Refused(f"{target} reads another axis than the one {name} widens")
        if isinstance(consumer, CONVOLUTIONS):
            if axis != 1 or consumer.groups != 1:
                raise Refused(f"{target} is grouped, or reads another axis than the one {name} widens")
            if consumer.padding_mode != "zeros" and steps and steps[-1].label == "pad":
                steps = steps[:-1]  # the consumer's own padding, which its slice repeats
        if producer is consumer:
            raise Refused(f"{name} feeds itself")
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
            raise Refused(f"the output of {name} meets another tensor in {call.name}")
        if call.reads.count(value) > 1:
            raise Refused(f"the output of {name} meets itself in {call.name}")
        if call.parameters:
            return self.layered(call, axis, name), axis
        kwargs = {k: v for k, v in call.kwargs.items() if not isinstance(v, Tensor)}
        args = tuple(a for a in call.args if not isinstance(a, Tensor))
        if call.name in RESHAPE:
            if tuple(before) == tuple(after):
                return Replay("clone", torch.clone), axis
            if axis == 1 and len(after) == 2 and after[0] == before[0] and after[1] == math.prod(before[1:]):
                return Flatten("flatten"), 1
            raise Refused(f"{call.name} {tuple(before)} -> {tuple(after)} mixes the channels of {name}")
        leads = not call.args or isinstance(call.args[0], Tensor)  # pow(2, x) cannot be replayed as pow(x, 2)
        if call.name in ELEMENTWISE and before == after and leads:
            return Replay(call.name, call.func, args, kwargs, "training" in kwargs), axis
        if call.name in SPATIAL and axis == 1 and len(before) > 2 and before[:2] == after[:2]:
            return Replay(
                call.name, call.func, args, kwargs, call.name.startswith(("dropout", "feature"))
            ), axis
        if call.name in REDUCE and axis == 1 and is_spatial(call, len(before)):
            return Replay(call.name, call.func, args, kwargs), axis
        raise Refused(f"{call.name} over the output of {name} does not treat every channel alone")

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
            raise Refused(f"{path} between {name} and its consumer shares its tensors")
        times = max(len(set(self.recording.uses[p])) for p in call.parameters)
        if times > 1:
            raise Refused(
                f"{path} between {name} and its consumer is called {times} times, or read elsewhere"
            )
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
        raise Refused(
            f"{label} ({call.name}) stands between {name} and its consumer and mixes or owns channels"
        )


def positions(call: Call, layer: nn.Module) -> int:
    """Count the positions per example at which a layer is applied."""
    shape = call.shape or torch.Size()
    return math.prod(shape[1:-1]) if isinstance(layer, nn.Linear) else math.prod(shape[2:])


def is_spatial(call: Call, dims: int) -> bool:
    """Tell a reduction that leaves batch and channels alone; equal sizes can make shapes look so."""
    given = call.argument(1, "dim")
    axes = (given,) if isinstance(given, int) else tuple(given or ())
    return bool(axes) and all(axis % dims > 1 for axis in axes)


def is_depthwise(module: nn.Module) -> bool:
    """Tell a convolution that keeps every channel to itself."""
    return isinstance(module, CONVOLUTIONS) and module.groups == module.in_channels == module.out_channels > 1
