"""What torch does not promise is asked for before it is used, and an error names the torch that has it.

Private names of torch stand only in files named ``private_api.py``; test_architecture lists the exceptions.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version

from esper.errors import EsperError


def demand(owner: object, names: Iterable[str], read_in: str, purpose: str) -> None:
    """Refuse a torch that lacks a private name.

    Args:
        owner: The module, class or object of torch's that has the names.
        names: Attributes that are about to be used.
        read_in: The torch release in which they were read.
        purpose: What they are needed for, in words.

    Raises:
        EsperError: One is missing; the message names it and the torch that has it.
    """
    for name in names:
        if not hasattr(owner, name):
            kind = owner if isinstance(owner, type) else type(owner)
            place = getattr(owner, "__name__", kind.__name__)
            raise EsperError(
                f"{purpose} needs {place}.{name}, which torch {version('torch')} does not have; torch "
                f"{read_in} has it: install that one"
            )
