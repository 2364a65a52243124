"""Find what reads a recurrent layer, or say why its hidden size cannot grow."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize

from esper.contracts import Site
from esper.kasmina.recording.recorder import Call, Refused
from esper.kasmina.recording.shaping import examples
from esper.kasmina.recording.tracks import Track
from esper.kasmina.sites.finder import RECURRENT, Finder, labels, positions
from esper.kasmina.sites.proof import entered
from esper.kasmina.widths.layers import CONVOLUTIONS, in_size
from esper.kasmina.widths.recurrent import RecurrentPair

PARTS = ("its outputs", "its last state", "its last cell")


def recurrent(finder: Finder, name: str) -> RecurrentPair:
    """Return the place at a recurrent layer.

    Raises:
        Refused: With the reason.
    """
    layer = finder.modules[name]
    assert isinstance(layer, nn.RNNBase)
    call = only_call(finder, name, layer)
    x = call.args[0]
    assert isinstance(x, Tensor)
    seen = entered(finder.recording, finder.modules, [name])[name]
    if any(isinstance(part, Tensor) and part.dim() != 3 for args, _ in seen for part in args[:1]):
        raise Refused(f"{name} runs on input without a batch axis")
    if any(is_given(given) for given in seen):
        raise Refused(
            f"{name} is given its first state, whose size would stay; torch starts from zeros where none is "
            "given: leave it out to let the hidden size grow"
        )
    part = read(finder, name, call)
    batch = 0 if layer.batch_first else 1
    track = Track(name, call.makes[part], 2, batch=1 if part else batch)
    target, reader = finder.follow(track)
    return close(finder, layer, track, target, reader, part, examples(x.shape, batch, 2))


def only_call(finder: Finder, name: str, layer: nn.RNNBase) -> Call:
    """Return the one call of the layer; refuse what cannot be written as a layer beside it."""
    kind = type(layer).__name__
    if getattr(layer, "proj_size", 0):
        raise Refused(
            f"{name} is an {kind} with projections (proj_size), which new units would have to share"
        )
    if parametrize.is_parametrized(layer):
        raise Refused(f"the weights of {name} are parametrised")
    calls: set[int] = set()
    for own, tensor in layer._parameters.items():
        if tensor is None:
            raise Refused(f"{own} of {name} is missing")
        calls.update(finder.untied(name, own, tensor))
    if not calls:
        raise Refused(f"{name} was not called by the probe")
    if len(calls) > 1:
        raise Refused(f"{name} is called {len(calls)} times, or its weights are read elsewhere")
    call = finder.recording.calls[calls.pop()]
    if call.name not in RECURRENT or type(layer) not in (nn.LSTM, nn.GRU, nn.RNN):
        raise Refused(f"the weights of {name} are read by {call.name}, not by a layer of torch's own")
    if not isinstance(call.args[2], (list, tuple)):
        raise Refused(
            f"{name} reads packed sequences, which a kernel cannot; pad them and mask the loss to let its "
            "hidden size grow"
        )
    return call


def is_given(call: tuple[tuple[object, ...], dict[str, object]]) -> bool:
    """Tell whether a recurrent layer was called with a first state."""
    args, kwargs = call
    return (len(args) > 1 and args[1] is not None) or kwargs.get("hx") is not None


def read(finder: Finder, name: str, call: Call) -> int:
    """Say which of outputs, last states and last cells is read; only one may be."""
    outputs, readers = finder.recording.outputs, finder.recording.readers
    parts = [i for i, value in enumerate(call.makes) if value in outputs or readers.get(value)]
    if not parts:
        raise Refused(f"nothing the probe recorded reads the output of {name}")
    if len(parts) > 1:
        what = " and ".join(PARTS[part] for part in parts)
        raise Refused(f"{what} of {name} are both read; only one way to one consumer can be followed")
    return parts[0]


def close(
    finder: Finder,
    layer: nn.RNNBase,
    track: Track,
    target: str,
    reader: Call,
    part: int,
    time: int,
) -> RecurrentPair:
    """Check the consumer and build the place."""
    name, consumer = track.name, finder.modules[target]
    finder.only_call(target)
    finder.fits(track, target, consumer)
    columns = 2 if layer.bidirectional and part == 0 else 1
    if in_size(consumer) != columns * layer.hidden_size:
        raise Refused(f"{target} reads {in_size(consumer)} numbers, not the {layer.hidden_size} of {name}")
    if columns > 1 and any(step.grows() for step in track.steps):
        raise Refused(
            f"a layer with channels of its own stands between both directions of {name} and {target}"
        )
    between = labels(track.steps)
    site = Site(f"{name}>{target}", "pair", name, target, between, layer.hidden_size, track.granularity, 0, 0)
    shape = reader.shape or finder.recording.shapes[track.value]
    places = positions(reader, consumer)
    if not isinstance(consumer, CONVOLUTIONS):
        places = examples(shape, track.batch, track.axis)
    steps = tuple(track.steps)
    return RecurrentPair(site, layer, consumer, part, steps, columns, (time, places), track.flops).refreshed()
