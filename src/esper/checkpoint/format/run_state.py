"""What a checkpoint's state is made of; ``checking.py`` asks whether one read from a storage is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NotRequired, TypedDict

from torch import Tensor

from esper.surgery.isolation.global_streams import NumpyState


class Streams(TypedDict):
    """Every random stream of a process."""

    python: tuple[object, ...]
    numpy: NumpyState
    torch: Tensor  # uint8 (bytes of the state,)
    cuda: list[Tensor] | None  # per device; None: CUDA was not in use
    generators: Mapping[str, object]  # state by name


class Position(TypedDict):
    """Where a process is in its data."""

    epoch: int
    index: int  # batches of the epoch that were handed out
    began: Streams | None  # the streams when the epoch began
    length: NotRequired[int | None]  # batches of an epoch


class ModuleState(TypedDict):
    """What a module knows."""

    state: Mapping[str, object]  # of ``state_dict``: tensors, or marks of sharded ones
    buffers: Mapping[str, Tensor]  # that are not part of it
    owned: NotRequired[list[str]]  # names of buffers that are
    frozen: list[str]  # names of parameters


class GroupState(TypedDict):
    """One group of an optimizer's parameters."""

    names: list[str]
    settings: dict[str, object]


class OptimizerState(TypedDict):
    """An optimizer's state under the names of its parameters."""

    kind: str  # name of its class
    groups: list[GroupState]
    state: Mapping[str, Mapping[str, object]]  # parameter -> key -> value


class EarlyState(TypedDict):
    """Of early growth, what a checkpoint itself reads."""

    evidence: Mapping[str, object]


class GrowthState(TypedDict, total=False):
    """Of a growth, what a checkpoint itself reads; growth keeps more beside it."""

    plans: list[Mapping[str, object]]
    batches: object
    trial: object
    others: object
    early: EarlyState | None


class Chunk(TypedDict):
    """A part of a sharded tensor."""

    shard: str
    at: list[int]  # offset per axis
    shape: list[int]


class TensorFacts(TypedDict):
    """A sharded tensor."""

    dtype: str  # as safetensors calls it
    shape: list[int]
    chunks: list[Chunk]


class ShardFacts(TypedDict):
    """What a shard must be when it is read."""

    size: int  # bytes
    sha256: str


class ListedShard(ShardFacts):
    """A shard as a checkpoint's summary lists it."""

    name: str


class Table(TypedDict):
    """Where the sharded tensors of a state lie."""

    shards: dict[str, ShardFacts]  # by name
    tensors: dict[str, TensorFacts]  # by path in the state


class OwnState(TypedDict):
    """The part of a run's state that other processes do not share."""

    growth: Mapping[str, object] | None
    evidence: NotRequired[Mapping[str, object]]
    buffers: Mapping[str, Mapping[str, object]]  # by module
    others: Mapping[str, object]
    batches: Position | None
    randomness: Streams


class RunState(TypedDict):
    """A run's state; one that ``save_sharded`` keeps has modules, optimizers, ``rest`` and a table alone."""

    steps: int
    config: object
    growth_config: Mapping[str, object] | None
    growth: GrowthState | None
    modules: Mapping[str, ModuleState]
    optimizers: Mapping[str, OptimizerState]
    others: Mapping[str, object]
    batches: Position | None
    randomness: Streams
    processes: NotRequired[list[OwnState]]
    table: NotRequired[Table]
    rest: NotRequired[object]
