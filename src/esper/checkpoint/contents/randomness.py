"""Every random stream a run draws from: Python's, NumPy's, torch's, CUDA's, and those it is given."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TypeAlias, cast

import numpy as np
import torch

from esper.checkpoint.format.run_state import Streams
from esper.errors import StateError

Generator: TypeAlias = "torch.Generator | np.random.Generator | random.Random"


def capture_randomness(generators: Mapping[str, Generator]) -> Streams:
    """Return the state of the global streams and of ``generators``.

    CUDA streams are read only where CUDA is in use: reading one would initialise it.
    """
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
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
    random.setstate(state["python"])
    np.random.set_state(cast("dict[str, object]", state["numpy"]))
    torch.set_rng_state(state["torch"])
    for name, generator in generators.items():
        set_state(generator, state["generators"][name])
    cuda = state["cuda"] or []
    here = torch.cuda.device_count() if cuda and torch.cuda.is_available() else 0
    for index, one in enumerate(cuda[:here]):
        torch.cuda.set_rng_state(one, index)
    if len(cuda) > here:
        return [f"the random streams of {len(cuda) - here} CUDA devices that this machine does not have"]
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
