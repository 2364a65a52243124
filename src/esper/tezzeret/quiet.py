"""Keeps what torch says about its own future out of the user's console."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore torch's deprecation and experiment notices inside the block; errors still come through.

    TorchScript is deprecated since torch 2.10 and the exporters announce internal changes; a user who picked
    a pipeline by name, or left the choice to ``auto``, can do nothing about either. This is the only place
    that hides them. The filters are the process's own, so another thread is quiet for as long.
    """
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category)
        yield
