"""Follow a layer's output through a recorded run until a layer consumes it, or say why none does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from esper.contracts import Site
from esper.kasmina.recording.between import (
    ELEMENTWISE,
    RESHAPE,
    SPATIAL,
    Flatten,
    GroupNorm,
    Replay,
    Step,
)
from esper.kasmina.recording.penalties import is_penalty
from esper.kasmina.recording.recorder import OPERATORS, Call, Recording, Refused
from esper.kasmina.recording.regions import region
from esper.kasmina.recording.scalars import scalar
from esper.kasmina.recording.shaping import moved
from esper.kasmina.recording.tracks import Met, Parted, Track
from esper.kasmina.sites.attention import Behind, attentions
from esper.kasmina.sites.norms import layered, weightless
from esper.kasmina.sites.proof import Entered, around, entered
from esper.kasmina.sites.uncalled import UNCALLED
from esper.kasmina.widths.layers import (
    CONVOLUTIONS,
    PLAIN,
    TRANSPOSED,
    forward_of_its_own,
    in_size,
    is_depthwise,
    is_layer,
    is_linear,
    out_size,
)
from esper.kasmina.widths.pairs import Pair
from esper.printable import times

FAST = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
PENALISED = (
    "the loss takes gradients with respect to the tensors of {name}, and new units would bring some of their "
    "own: give esper.grow a loss_fn without that term; the loop may train with it as before"
)
PRODUCTS = frozenset({"mul", "__mul__", "mul_", "multiply", "__imul__"})
RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
PARTING = frozenset({"glu", "chunk", "split", "tensor_split"})


class Finder:
    """Follows each layer's output through one recording until a layer consumes it.

    Args:
        model: The host.
        recording: Recording of one pass.
        examples: Number of examples in that pass, where it is known.
    """

    def __init__(self, model: nn.Module, recording: Recording, examples: int | None = None) -> None:
        self.model, self.recording, self.examples = model, recording, examples
        self.called: dict[str, list[Call]] = {}  # what calls_of has found
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.owners: dict[str, list[str]] = {}  # parameter's first name -> modules that hold that tensor
        first = {id(t): n for n, t in [*model.named_parameters(), *model.named_buffers()]}
        for path, module in self.modules.items():
            for tensor in [*module._parameters.values(), *module._buffers.values()]:
                if tensor is not None:
                    self.owners.setdefault(first[id(tensor)], []).append(path)
        self.first = first

    @cached_property
    def attentions(self) -> dict[str, tuple[str, Behind]]:
        """Map the layers in front of attention to the layer behind it."""
        return attentions(self.recording, self.modules)

    @cached_property
    def entered(self) -> Entered:
        """Note what the modules around attention are called with: the smallest is run again for a proof."""
        groups = [
            [path, *(n for n in behind.sources if n in self.modules)]
            for path, behind in self.attentions.values()
        ]
        return entered(self.recording, self.modules, [path for names in groups for path in around(names)])

    def begin(self, name: str, turn: int = 0) -> Track:
        """Start at one of the calls of a layer that can produce."""
        producer = self.modules[name]
        call = self.calls_of(name)[turn]
        if any(parameter.is_complex() for parameter in producer.parameters(recurse=False)):
            raise Refused(f"{name} computes with complex numbers")
        if out_size(producer) == 0:
            raise Refused(f"{name} makes nothing: it has a width of 0, and so has nothing to start from")
        if getattr(producer, "groups", 1) != 1:
            raise Refused(f"{name} is a grouped convolution")
        if isinstance(producer, CONVOLUTIONS) and len(call.shape or ()) != len(producer.kernel_size) + 2:
            raise Refused(f"{name} runs on input without a batch axis")
        axis = len(call.shape or ()) - 1 if is_linear(producer) else 1
        return Track(name, call.makes[0], axis, turn=turn)

    def follow(self, track: Track, readers: Sequence[Call] = ()) -> tuple[str, Call]:
        """Go on until a layer reads the value; returns its name and call.

        Args:
            track: Track to follow.
            readers: Calls that read the value it is at, those to follow; None: all.

        Raises:
            Parted: Where several calls read the value.
        """
        while True:
            readers = readers or self.readers(track.value, track.name)
            if itself(readers, track.value):  # how torch marks what a backward hook is called for
                track.value, readers = readers[0].makes[0], ()
                continue
            if len(readers) > 1 or readers[0].reads.count(track.value) > 1:
                try:
                    step, track.value = region(self.recording, track.value, track.name, readers)
                except Refused as refusal:
                    raise Parted(str(refusal), readers) from None
                track.steps.append(step)
                readers = ()
                continue
            (reader,), readers = readers, ()
            following = self.layer_of(reader)
            if following is not None and not is_depthwise(following[1]):
                return following[0], reader
            step = self.advance(reader, track)
            if isinstance(step, GroupNorm):
                track.granularity = math.lcm(track.granularity, step.group)
            if reader.shape is not None:
                track.flops += step.unit_flops(reader.shape)
            track.steps.append(step)
            track.value = reader.makes[0]

    def advance(self, reader: Call, track: Track) -> Step:
        """Turn a call into a step, and move on to where the axes are behind it."""
        read = {*self.recording.readers, *self.recording.outputs}
        if any(value in read for value in reader.makes[1:]):
            raise Refused(
                f"{reader.spoken} over the output of {track.name} has several results that are read"
            )
        there = moved(reader, self.recording.shapes[track.value], track.axis, track.batch)
        if there is None or reader.shape is None:
            if track.batch and reader.name not in ELEMENTWISE | RECURRENT:
                raise Refused(
                    f"{reader.spoken} over the output of {track.name} runs with time as its first axis, as "
                    "packed sequences do: pad and mask, or give the recurrent layer batch_first=True"
                )
            step, track.axis = self.step(reader, track.value, track.axis, track.name)
            return step
        track.axis, track.batch = there.axis, there.batch
        return there.step

    def only_call(self, name: str) -> Call:
        """Return the call of a layer that may have only one."""
        calls = self.calls_of(name)
        if len(calls) > 1:
            raise Refused(f"{name} is called {times(len(calls))} in a pass; here it may be called once")
        return calls[0]

    def calls_of(self, name: str) -> list[Call]:
        """Return the calls of a layer; refuse layers that are tied, altered or read elsewhere."""
        if name not in self.called:
            self.called[name] = self.own_calls(name)
        return self.called[name]

    def own_calls(self, name: str) -> list[Call]:
        """Look for the calls of a layer."""
        if self.recording.transformed:
            raise Refused(
                "the model is called inside torch.func (vmap, grad, jacrev), where no unit can be added to a "
                "call; take such gradients with torch.autograd.grad"
            )
        module = self.modules[name]
        for own in ("weight", "bias"):
            made = getattr(module, own, None) is not None and own not in module._parameters
            if made or (own == "weight" and parametrize.is_parametrized(module)):
                raise Refused(f"the {own} of {name} is parametrised (or pruned)")
        calls: set[int] = set()
        for own in ("weight", "bias"):
            tensor = module._parameters.get(own)
            if tensor is None:
                continue
            calls.update(self.untied(name, own, tensor))
        if not calls:
            raise Refused(f"{name} {UNCALLED}")
        found = [self.recording.calls[c] for c in sorted(calls)]
        other = next((call for call in found if call.name not in OPERATORS), None)
        if other is not None and len(found) > 1:
            if all(call.name in (*OPERATORS, "grad") for call in found):
                raise Refused(PENALISED.format(name=name))
            names = ", ".join(sorted({call.spoken for call in found}))
            own = forward_of_its_own(module)
            kind = f"; {name} is a {own} with a forward of its own" if own else ""
            raise Refused(f"the tensors of {name} are read by more than its own call ({names}){kind}")
        if isinstance(self.modules.get(name.rpartition(".")[0]), nn.MultiheadAttention):
            raise Refused(
                f"the weight of {name} is read by {found[0].name}: nn.MultiheadAttention never calls it as a "
                "layer, and fixes its width to embed_dim"
            )
        if other is not None:
            raise Refused(f"the weight of {name} is read by {other.spoken}, not by the layer itself")
        padding = getattr(module, "output_padding", 0)
        if isinstance(module, TRANSPOSED) and any(
            call.argument(5, "output_padding", 0) != padding for call in found
        ):
            raise Refused(f"{name} is called with output_size; give it output_padding when it is built")
        return found

    def uses(self, parameter: str) -> list[int]:
        """Return the calls a parameter was given to, but for penalties on its size."""
        return [c for c in self.recording.uses.get(parameter, []) if not is_penalty(self.recording, c)]

    def untied(self, name: str, own: str, tensor: Tensor) -> list[int]:
        """Return the calls that a layer's parameter was given to.

        Raises:
            Refused: Another layer has it, too.
        """
        first = self.first[id(tensor)]
        if len(self.owners[first]) > 1:
            others = ", ".join(owner for owner in self.owners[first] if owner != name)
            raise Refused(f"{name}.{own} is tied to {others}")
        return self.uses(first)

    def readers(self, value: int, name: str) -> list[Call]:
        """Return the calls that read a value."""
        if value in self.recording.outputs:
            raise Refused(f"the output of {name} is an output of the model")
        readers = sorted(set(self.recording.readers.get(value, [])))
        if not readers:
            raise Refused(
                f"nothing the probe recorded reads the output of {name}: it is left unused, or read by code "
                "that cannot be followed (TorchScript, numpy, an operator of your own); use torch's functions"
            )
        return [self.recording.calls[r] for r in readers]

    def layer_of(self, call: Call) -> tuple[str, nn.Module] | None:
        """Return the Linear or convolution a call belongs to."""
        for parameter in call.parameters:
            path, _, own = parameter.rpartition(".")
            module = self.modules.get(path)
            if own == "weight" and module is not None and is_layer(module) and call.name in OPERATORS:
                return path, module
        return None

    def close(self, track: Track, target: str, call: Call) -> Pair:
        """Check the consumer and build the pair."""
        name, producer, consumer = track.name, self.modules[track.name], self.modules[target]
        steps = self.landed(track, target, call)
        site = Site(
            name=f"{name}>{target}",
            kind="pair",
            entry=name,
            exit=target,
            between=labels(steps),
            width=out_size(producer),
            granularity=track.granularity,
            unit_parameters=0,
            unit_flops=0,
        )
        columns = in_size(consumer) // out_size(producer)
        places = positions(self.calls_of(name)[track.turn], producer), positions(call, consumer)
        fast = self.fast(name, target)
        return Pair(site, producer, consumer, tuple(steps), columns, places, track.flops, fast).refreshed()

    def landed(self, track: Track, target: str, call: Call) -> Sequence[Step]:
        """Check the consumer a track ends at; returns the steps before it."""
        consumer, steps = self.modules[target], track.steps
        own, theirs = self.calls_of(track.name), self.calls_of(target)
        if self.modules[track.name] is consumer:
            raise Refused(f"{track.name} is called {times(len(own))} in a pass and feeds itself")
        if len(own) != len(theirs):
            raise Refused(
                f"{target} is called {times(len(theirs))} in a pass and {track.name} {times(len(own))}; "
                "every call of the one must lead to a call of the other"
            )
        if theirs[track.turn] is not call:  # what one call showed is put together by its number
            number = 1 + next(index for index, one in enumerate(theirs) if one is call)
            raise Refused(
                f"call {track.turn + 1} of {track.name} leads to call {number} of {target}; both must be "
                "called in the same order"
            )
        self.fits(track, target, consumer)
        circular = isinstance(consumer, PLAIN) and consumer.padding_mode != "zeros"
        if circular and steps and steps[-1].label == "pad":
            return steps[:-1]  # the consumer's own padding, which its slice repeats
        return steps

    def fits(self, track: Track, target: str, consumer: nn.Module) -> None:
        """Refuse a consumer that reads another axis."""
        name, axis, dims = track.name, track.axis, len(self.recording.shapes[track.value])
        if is_linear(consumer) and axis != dims - 1:
            raise Refused(f"{target} reads another axis than the one {name} widens")
        if isinstance(consumer, CONVOLUTIONS) and (axis != 1 or track.batch or consumer.groups != 1):
            raise Refused(f"{target} is grouped, or reads another axis than the one {name} widens")

    def fast(self, *names: str) -> tuple[nn.Module, ...]:
        """List the outermost modules around layers that have a fast path past them."""
        found: dict[str, nn.Module] = {}
        for name in names:
            parts = name.split(".")
            above = [".".join(parts[:depth]) for depth in range(len(parts))]
            first = next((path for path in above if isinstance(self.modules[path], FAST)), None)
            found |= {} if first is None else {first: self.modules[first]}
        return tuple(found.values())

    def step(self, call: Call, value: int, axis: int, name: str) -> tuple[Step, int]:
        """Turn a call into a step, with the axis the channels are on behind it."""
        before, after = self.recording.shapes[value], call.shape
        others = [r for r in call.reads if r != value]
        product = call.name in PRODUCTS and len(call.reads) == 2 and not call.parameters
        if product and len(others) == 1 and self.recording.shapes[others[0]] == before == after:
            raise Met(name, call)
        if call.name in RECURRENT:
            raise Refused(
                f"a recurrent layer ({call.name}) reads the output of {name}: nothing can be added to what "
                "it makes; only a Linear or a convolution can take more inputs"
            )
        if call.name in OPERATORS and others and call.reads[0] == value:
            raise Refused(
                f"the output of {name} goes into a layer whose weight is made in the pass ({call.name}): "
                "remove its parametrisation, weight norm for example, to let it take more inputs"
            )
        if others and is_loss(call):
            raise Refused(f"{name} is an output layer: {call.name} reads it, and its width is the task's")
        if others or not call.makes or after is None:
            raise Refused(f"the output of {name} meets another tensor in {call.spoken}")
        if call.parameters:
            one = scalar(call, self.modules) if before == after else None
            return one or layered(self, call, axis, name), axis
        norm = weightless(self, call, axis, name)
        if norm is not None:
            return norm, axis
        kwargs = {k: v for k, v in call.kwargs.items() if not isinstance(v, Tensor)}
        args = tuple(a for a in call.args if not isinstance(a, Tensor))
        if call.name in RESHAPE:
            if tuple(before) == tuple(after):
                return Replay("clone", torch.clone), axis
            if axis == 1 and len(after) == 2 and after[0] == before[0] and after[1] == math.prod(before[1:]):
                return Flatten("flatten"), 1
            if axis == 1 and len(before) > 3 and tuple(after) == (*before[:2], math.prod(before[2:])):
                return Replay("flatten", torch.flatten, (2,)), 1  # positions only
            raise Refused(f"{call.name} {tuple(before)} -> {tuple(after)} mixes the channels of {name}")
        leads = not call.args or isinstance(call.args[0], Tensor)  # pow(2, x) cannot be replayed as pow(x, 2)
        if call.name in ELEMENTWISE and before == after and leads:
            return Replay(call.name, call.func, args, kwargs, "training" in kwargs), axis
        if call.name in SPATIAL and axis == 1 and len(before) > 2 and before[:2] == after[:2]:
            return Replay(
                call.name, call.func, args, kwargs, call.name.startswith(("dropout", "feature"))
            ), axis
        if call.name in PARTING:
            raise Refused(
                f"{call.name} cuts the output of {name} into parts (a fused gate, for example): new units "
                "would be rows in its middle; write the parts as layers of their own"
            )
        if call.name == "squeeze":
            raise Refused(f"squeeze over the output of {name} might take the channels away; give it a dim=")
        raise Refused(f"{call.spoken} over the output of {name} does not treat every channel alone")


def is_loss(call: Call) -> bool:
    """Tell one of torch's losses."""
    return call.name.endswith("_loss") or call.name.startswith(("cross_entropy", "binary_cross", "kl_div"))


def itself(readers: Sequence[Call], value: int) -> bool:
    """Tell a tensor viewed as itself."""
    return len(readers) == 1 and readers[0].name == "view_as" and set(readers[0].reads) == {value}


def labels(steps: Sequence[Step]) -> tuple[str, ...]:
    """Name steps, in order."""
    return tuple(step.label for step in steps)


def positions(call: Call, layer: nn.Module) -> int:
    """Count the positions per example at which a layer is applied."""
    shape = call.shape or torch.Size()
    return math.prod(shape[1:-1]) if is_linear(layer) else math.prod(shape[2:])
