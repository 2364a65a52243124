"""The process-wide random streams, read and put back: Python's, numpy's, torch's, and CUDA's."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

NumpyState: TypeAlias = "dict[str, object] | tuple[str, np.ndarray, int, int, float]"  # either form


@dataclass(frozen=True, slots=True)
class GlobalStreams:
    """The state of every stream; ``cuda`` is None where CUDA is not in use: reading would initialise it."""

    python: tuple[object, ...]
    numpy: NumpyState
    torch: Tensor
    cuda: list[Tensor] | None

    @classmethod
    def capture(cls) -> GlobalStreams:
        """Read the streams."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        numpy_state: NumpyState = np.random.get_state(legacy=False)
        return cls(random.getstate(), numpy_state, torch.get_rng_state(), cuda)

    def restore(self) -> int:
        """Put the streams back; returns how many CUDA devices this machine lacks."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        cuda = self.cuda or []
        here = torch.cuda.device_count() if cuda and torch.cuda.is_available() else 0
        for index, state in enumerate(cuda[:here]):
            torch.cuda.set_rng_state(state, index)
        return max(len(cuda) - here, 0)
