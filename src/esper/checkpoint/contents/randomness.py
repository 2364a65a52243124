"""Every random stream a run draws from: Python's, NumPy's, torch's, CUDA's, and those it is given."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TypeAlias, cast

import numpy as np
import torch

from esper.checkpoint.format.run_state import Streams
from esper.errors import StateError
from esper.surgery.isolation.global_streams import GlobalStreams

Generator: TypeAlias = "torch.Generator | np.random.Generator | random.Random"


def capture_randomness(generators: Mapping[str, Generator]) -> Streams:
    """Return the state of the global streams and of ``generators``.

    CUDA streams are read only where CUDA is in use: reading one would initialise it.
    """
    streams = GlobalStreams.capture()
    return {
        "python": streams.python,
        "numpy": streams.numpy,
        "torch": streams.torch,
        "cuda": streams.cuda,
        "generators": {name: state_of(generator) for name, generator in generators.items()},
    }


def restore_randomness(state: Streams, generators: Mapping[str, Generator]) -> list[str]:
    """Put every stream back.

    Returns:
        What could not be put back, in words.

    Raises:
        StateError: The state and the run have other generators.
    """
    if state["generators"].keys() != generators.keys():
        raise StateError(
            f"the state has the generators {sorted(state['generators'])}, the run has {sorted(generators)}; "
            "give the run those it had"
        )
    lost = GlobalStreams(state["python"], state["numpy"], state["torch"], state["cuda"]).restore()
    for name, generator in generators.items():
        set_state(generator, state["generators"][name])
    if lost:
        return [f"the random streams of {lost} CUDA devices that this machine does not have"]
    return []


def state_of(generator: Generator) -> object:
    """Return one generator's state."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.bit_generator.state


def set_state(generator: Generator, state: object) -> None:
    """Put one generator's state back."""
    if isinstance(generator, torch.Generator):
        generator.set_state(cast("torch.Tensor", state))
    elif isinstance(generator, random.Random):
        generator.setstate(cast("tuple[object, ...]", state))
    else:
        generator.bit_generator.state = cast("dict[str, object]", state)
