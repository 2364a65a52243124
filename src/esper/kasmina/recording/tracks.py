"""How far one call's output has been followed, and where it could not be followed further."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from esper.kasmina.recording.between import Step
from esper.kasmina.recording.recorder import Call, Refused


class Met(Refused):
    """A chain came to a product with another chain's output."""

    def __init__(self, name: str, call: Call) -> None:
        super().__init__(f"the output of {name} meets another tensor in {call.spoken}")
        self.call = call


class Parted(Refused):
    """A chain came to a value that several calls read, which do not meet again at once."""

    def __init__(self, why: str, readers: Sequence[Call]) -> None:
        super().__init__(why)
        self.readers = readers


@dataclass
class Track:
    """How far a layer's output has been followed."""

    name: str
    value: int
    axis: int  # of the channels
    steps: list[Step] = field(default_factory=list)
    flops: int = 0
    granularity: int = 1
    batch: int = 0  # axis of the examples
    turn: int = 0  # which of the layer's calls this began at
