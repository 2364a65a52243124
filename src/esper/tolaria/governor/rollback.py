"""A ring of snapshots in the host's memory, and the way back to one of them, bit for bit and in place.

A snapshot holds what the next step depends on: weights, buffers, the optimizers' state and settings,
averages, schedulers, scaler and every global random stream. Spent gradients are not kept; they are cleared on
the way back. Restoring copies into the tensors that are there, so parameters, optimizer state and whatever
the user holds keep their identity.

The rule for growth: no snapshot outlives a change of topology. The ring is cleared when a widening commits
and begins again behind it; a snapshot whose tensors no longer fit is refused, never adapted.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.checkpoint.contents.run import Stateful
from esper.errors import StateError
from esper.surgery.isolation.global_streams import GlobalStreams, NumpyState
from esper.surgery.optimizers.widening import mapped

Capture = tuple[Callable[[], object], Callable[..., None]]  # what else goes back: how to read and to write it
KEPT = "a kept tensor"  # marks one in a checkpoint
LAG = 3  # steps a fault may work before it shows in the loss
KEEP = 2  # detection lags by a few steps, so the newest snapshot may hold the fault already
State: TypeAlias = dict[str, object]  # of a parameter in an optimizer, or a group's settings
Streams: TypeAlias = "tuple[tuple[object, ...], NumpyState, Tensor, list[Tensor] | None]"


class SnapshotState(TypedDict):
    """A snapshot as a checkpoint keeps it; tensors by name."""

    step: int
    tensors: object  # ``written`` of the snapshot's
    states: list[list[tuple[str, object]]]  # per optimizer: name of a parameter, ``written`` state
    groups: list[list[State]]  # per optimizer
    settings: list[object]
    randomness: list[object]  # Python's, numpy's, torch's and CUDA's streams
    captured: State


@dataclass(frozen=True, slots=True)
class Kept:
    """A copy of a tensor in the host's memory, and where it came from."""

    copy: Tensor
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Kept:
        """Copy a tensor."""
        return cls(tensor.detach().to("cpu", copy=True), tensor.device)


@dataclass
class Snapshot:
    """A moment of a run; tensors are copies."""

    step: int
    tensors: dict[str, Kept]  # of models and averages, by name
    states: list[list[tuple[Tensor, State]]]  # per optimizer: parameter and its state
    groups: list[list[State]]  # per optimizer: its groups, parameters by identity
    settings: list[object]  # of schedulers and scaler
    randomness: GlobalStreams
    captured: State

    @property
    def nbytes(self) -> int:
        """Return the memory it takes."""
        states = (v for one in self.states for _, state in one for v in state.values())
        tensors = [*self.tensors.values(), *(v for v in states if isinstance(v, Kept))]
        return sum(k.copy.numel() * k.copy.element_size() for k in tensors)


class Snapshots:
    """Keeps the latest snapshots of a run.

    Args:
        models: Model first, then its averages; all their parameters and buffers are kept.
        optimizers: Optimizers of the run, by name.
        stateful: Schedulers and scaler: whatever has ``state_dict`` and ``load_state_dict``.
        captures: Pairs of a function that reads what else goes back and one that writes it, by name.
        keep: Number of snapshots in the ring.
        every: Function that tells whether something holds in every process of the run.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        optimizers: Mapping[str, Optimizer],
        stateful: Sequence[Stateful] = (),
        captures: Mapping[str, Capture] | None = None,
        keep: int = KEEP,
        every: Callable[[bool], bool] = bool,
    ) -> None:
        self.models, self.optimizers = list(models), dict(optimizers)
        self.stateful, self.captures = list(stateful), dict(captures or {})
        self.ring: deque[Snapshot] = deque(maxlen=keep)
        self.every = every

    def take(self, step: int) -> Snapshot | None:
        """Copy the run as it is; None, and nothing is kept, where a weight or buffer is not finite."""
        tensors = dict(self.tensors())
        if not self.every(finite(tensors.values())):  # buffers differ from process to process
            return None
        snapshot = Snapshot(
            step,
            {name: Kept.of(tensor) for name, tensor in tensors.items()},
            [[(p, duplicate_state(s)) for p, s in o.state.items()] for o in self.optimizers.values()],
            [
                [{**duplicate_state(others(g)), "params": list(g["params"])} for g in o.param_groups]
                for o in self.each()
            ],
            [copy.deepcopy(one.state_dict()) for one in self.stateful],
            GlobalStreams.capture(),
            {name: copy.deepcopy(read()) for name, (read, _) in self.captures.items()},
        )
        self.ring.append(snapshot)
        return snapshot

    def before(self, since: int, lag: int = LAG) -> Snapshot | None:
        """Return the snapshot to go back to: the newest that is a little older than the first evidence.

        Where there is none so old, the oldest from before it, or None.

        Args:
            since: Step of the first evidence.
            lag: Steps the fault may have worked unseen.
        """
        fitting = [s for s in self.ring if s.step < since and self.misfit(s) is None]
        older = [s for s in fitting if s.step < since - lag]
        return (older[-1:] or fitting[:1] or [None])[0]

    def restore(self, snapshot: Snapshot) -> None:
        """Bring the run back to a snapshot; later ones are forgotten.

        Raises:
            StateError: The model has grown since; nothing was changed.
        """
        if (why := self.misfit(snapshot)) is not None:
            raise StateError(f"the snapshot of step {snapshot.step} does not fit any more: {why}")
        with torch.no_grad():
            for name, tensor in self.tensors():
                tensor.copy_(snapshot.tensors[name].copy)
        for model in self.models:
            model.zero_grad(set_to_none=True)
        for optimizer, states, groups in zip(self.each(), snapshot.states, snapshot.groups, strict=True):
            put_back(optimizer, states, groups)
        for one, settings in zip(self.stateful, snapshot.settings, strict=True):
            one.load_state_dict(copy.deepcopy(settings))
        for name, (_, write) in self.captures.items():
            write(copy.deepcopy(snapshot.captured[name]))
        snapshot.randomness.restore()
        while self.ring and self.ring[-1].step > snapshot.step:
            self.ring.pop()

    def clear(self) -> None:
        """Forget all snapshots: the topology has changed."""
        self.ring.clear()

    def state_dict(self) -> list[SnapshotState]:
        """Return the ring: what a run that goes on elsewhere needs to go back as far as this one could."""
        return [self._written(snapshot) for snapshot in self.ring]

    def _written(self, snapshot: Snapshot) -> SnapshotState:
        names = {id(tensor): name for name, tensor in self.tensors()}
        streams = snapshot.randomness
        return {
            "step": snapshot.step,
            "tensors": written(snapshot.tensors),
            "states": [[(names[id(p)], written(s)) for p, s in one] for one in snapshot.states],
            "groups": [
                [{**written_state(g), "params": [names[id(p)] for p in parameters_of(g)]} for g in one]
                for one in snapshot.groups
            ],
            "settings": snapshot.settings,
            "randomness": [streams.python, streams.numpy, streams.torch, streams.cuda],
            "captured": snapshot.captured,
        }

    def load_state_dict(self, state: Sequence[SnapshotState]) -> None:
        """Take the ring back; topology, and so every name, is what it was by now."""
        named = dict(self.tensors())
        self.ring.clear()
        for one in state:
            states = [[(named[name], read_state(s)) for name, s in each] for each in one["states"]]
            groups = [
                [
                    {**read_state(g), "params": [named[n] for n in cast("list[str]", g["params"])]}
                    for g in each
                ]
                for each in one["groups"]
            ]
            tensors = cast("dict[str, Kept]", read_back(one["tensors"]))
            randomness = GlobalStreams(*cast("Streams", tuple(one["randomness"])))
            rest = one["settings"], randomness, one["captured"]
            self.ring.append(Snapshot(one["step"], tensors, states, groups, *rest))

    def misfit(self, snapshot: Snapshot) -> str | None:
        """Say why a snapshot does not fit the model as it is now, or None."""
        now = {name: (tuple(t.shape), t.dtype) for name, t in self.tensors()}
        then = {name: (tuple(k.copy.shape), k.copy.dtype) for name, k in snapshot.tensors.items()}
        if now != then:
            name = next(n for n in {**then, **now} if now.get(n) != then.get(n))
            return f"{name} was {then.get(name)} and is {now.get(name)}"
        for optimizer, groups in zip(self.each(), snapshot.groups, strict=True):
            if [[id(p) for p in g["params"]] for g in optimizer.param_groups] != [
                [id(p) for p in parameters_of(g)] for g in groups
            ]:
                return f"{type(optimizer).__name__} has other parameters than it had"
        return None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name every parameter and buffer, each once, also those a state dict leaves out."""
        for index, model in enumerate(self.models):
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                yield f"{index}.{name}", tensor

    def each(self) -> list[Optimizer]:
        """List the optimizers in their order."""
        return list(self.optimizers.values())


def finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether all floating-point tensors are finite; one number is read per device."""
    floating = [t.detach() for t in tensors if t.is_floating_point() and t.numel()]
    if not floating:
        return True
    sums = [t.sum(dtype=torch.float64 if t.dtype == torch.float64 else torch.float32) for t in floating]
    if all(bool(torch.isfinite(s)) for s in sums):
        return True
    return all(bool(torch.isfinite(t).all()) for t in floating)  # a sum may overflow without a fault


def others(group: Mapping[str, object]) -> State:
    """Return a group's settings."""
    return {key: value for key, value in group.items() if key != "params"}


def parameters_of(group: State) -> list[Tensor]:
    """Return a group's parameters."""
    return cast("list[Tensor]", group["params"])


def duplicate_state(state: State) -> State:
    """Copy a state there or back."""
    return cast("State", duplicate(state))


def written_state(state: State) -> State:
    """Turn a state's copies into tensors."""
    return cast("State", written(state))


def read_state(state: object) -> State:
    """Undo :func:`written_state`."""
    return cast("State", read_back(state))


def duplicate(value: object, kept: Callable[[Tensor], object] = Kept.of) -> object:
    """Copy state there or back: tensors without their graph, containers of them, numbers.

    Args:
        value: To copy.
        kept: Makes the copy of a tensor.
    """
    return mapped(kept, value, restored)


def restored(value: object) -> object:
    """Undo :class:`Kept`; copy any other leaf."""
    return value.copy.to(value.device, copy=True) if isinstance(value, Kept) else copy.deepcopy(value)


def written(value: object) -> object:
    """Turn copies into tensors with the device they came from, for a checkpoint."""
    if isinstance(value, Kept):
        return {KEPT: value.copy, "device": str(value.device)}
    if isinstance(value, dict):
        return {key: written(item) for key, item in value.items()}
    if type(value) is list:
        return [written(item) for item in value]
    return tuple(written(item) for item in value) if type(value) is tuple else value


def read_back(value: object) -> object:
    """Undo :func:`written`."""
    if isinstance(value, dict):
        if KEPT in value:
            return Kept(value[KEPT], torch.device(value["device"]))
        return {key: read_back(item) for key, item in value.items()}
    if type(value) is list:
        return [read_back(item) for item in value]
    return tuple(read_back(item) for item in value) if type(value) is tuple else value


def put_back(optimizer: Optimizer, states: list[tuple[Tensor, State]], groups: list[State]) -> None:
    """Restore an optimizer; tensors that are there and fit are written into, for CUDA graphs hold them."""
    kept = {id(parameter) for parameter, _ in states}
    for parameter in [p for p in optimizer.state if id(p) not in kept]:
        del optimizer.state[parameter]
    for parameter, state in states:
        write(optimizer.state[parameter], state)
    for group, settings in zip(optimizer.param_groups, groups, strict=True):
        write(group, settings, skip=("params",))


def write(target: State, source: Mapping[str, object], skip: tuple[str, ...] = ()) -> None:
    """Make a dict equal to another, in place; tensors keep their identity where they fit."""
    for key in [key for key in target if key not in source]:
        del target[key]
    for key, value in source.items():
        if key in skip:
            continue
        old = target.get(key)
        if isinstance(value, Kept) and isinstance(old, Tensor) and same_kind(old, value):
            with torch.no_grad():
                old.copy_(value.copy)
        else:
            target[key] = duplicate(value)


def same_kind(tensor: Tensor, kept: Kept) -> bool:
    """Tell whether a copy can be written into a tensor without loss."""
    copied = kept.copy
    return tensor.shape == copied.shape and tensor.dtype == copied.dtype and tensor.device == kept.device
