"""The process a forge builds kernels in: ``python -m esper.tezzeret.worker``, driven by its standard input.

It first reads which function builds and what its limits are, holds itself to them, imports the function and
warms up; then it answers requests one by one until its input ends.
"""

from __future__ import annotations

import errno
import faulthandler
import os
import sys
from collections.abc import Callable
from typing import BinaryIO

from esper.contracts import Kernel
from esper.errors import EsperError, ForgeError
from esper.tezzeret import wire
from esper.tezzeret.limits import Limits

# What a build may raise and the worker lives on; anything else ends it with a traceback the forge reports.
_SURVIVED = (
    EsperError, ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError,
    NameError, OSError, RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip
_LIMITS = {
    errno.EFBIG: "wrote a larger file than Limits.file allows",
    errno.EMFILE: "opened more files than Limits.open_files allows",
    errno.ENOMEM: "needed more memory than Limits.memory allows",
}
_NO_MEMORY = ("can't allocate memory", "not enough memory")  # torch's CPU allocator raises RuntimeError


def main() -> int:
    """Serve one forge until it closes the pipe."""
    requests, answers = claim_pipes()
    faulthandler.enable()  # a segfault says where, on the error stream
    first = wire.receive(requests)
    if first is None:  # the forge was closed before it said a word
        return 0
    header, _ = first
    limits = Limits(**header["limits"])
    held = limits.enforce(header["parent"])
    try:
        build: Callable[[wire.Request], Kernel] = wire.load(header["build"])
        if header["warm"]:
            wire.load(header["warm"])()
    except _SURVIVED as error:
        answers.write(wire.encode_error(error))
        return 1
    answers.write(wire.pack({"ready": held}))
    while (frame := wire.receive(requests)) is not None:
        limits.begin_build()
        answers.write(answer(build, frame))
    return 0


def answer(build: Callable[[wire.Request], Kernel], frame: wire.Frame) -> bytes:
    """Build what a request asks for; return the frame that says what came of it."""
    try:
        return wire.encode_kernel(build(wire.decode_request(frame)))
    except _SURVIVED as error:
        broken = beyond_limits(error)
        return wire.encode_error(ForgeError(f"ran into its limits: {broken} ({error})") if broken else error)


def beyond_limits(error: BaseException) -> str | None:
    """Say which limit an error comes from, if from one."""
    if isinstance(error, MemoryError) or any(text in str(error) for text in _NO_MEMORY):
        return _LIMITS[errno.ENOMEM]
    return _LIMITS.get(error.errno or 0) if isinstance(error, OSError) else None


def claim_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Take standard input and output for frames; what anyone prints goes to the error stream."""
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    os.close(nothing)
    return requests, answers


if __name__ == "__main__":
    sys.exit(main())
