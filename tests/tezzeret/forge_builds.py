"""What workers of the forge's tests build: one real small kernel, and everything a hostile build may try."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import operator
import os
import random
import socket
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from esper.contracts import Kernel, Signature, kernel_id
from esper.errors import BlueprintError, CompileError

VECTOR = Signature("vector", "serial", 4, 4)


@dataclass(frozen=True)
class Ask:
    """A request; ``task`` is a key of TASKS."""

    task: str = "kernel"
    graph: str = '["linear", "relu", "linear"]'
    signature: Signature = VECTOR
    hidden: int = 3
    seed: int = 0
    words: tuple[str, ...] = ()


def build(ask: Ask) -> Kernel:
    """Build what the request asks for."""
    return TASKS[ask.task](ask)


def cannot_warm() -> None:
    raise CompileError("no compiler here")


def kernel(ask: Ask) -> Kernel:
    """Draw weights, run the graph, check what comes out; without torch, a worker starts in 0.2 s."""
    nodes = json.loads(ask.graph)
    if unknown := set(nodes) - {"linear", "relu", "nan"}:
        raise BlueprintError(f"node {nodes.index(min(unknown))}: no operator {min(unknown)}")
    drawn = random.Random(ask.seed)
    sizes = [ask.signature.inputs, *[ask.hidden] * (nodes.count("linear") - 1), 4]
    weights = [[[drawn.gauss(0, 1) for _ in range(a)] for _ in range(b)] for a, b in pairwise(sizes)]
    rest, x = list(weights), [1.0] * ask.signature.inputs
    for node in nodes:
        if node == "linear":
            x = [sum(map(operator.mul, row, x)) for row in rest.pop(0)]
        else:
            x = [max(value, 0.0) if node == "relu" else math.nan for value in x]
    if len(x) != ask.signature.outputs:
        raise CompileError(f"{len(x)} channels come out, {ask.signature.outputs} are declared")
    if not all(map(math.isfinite, x)):
        raise CompileError("the output is not finite")
    facts = (ask.graph, ask.signature, ask.hidden, ask.seed, "eager", f"python {sys.version}")
    report = {"pid": os.getpid(), "order": time.monotonic()}
    numbers = [value for matrix in weights for row in matrix for value in row]
    return Kernel(
        kernel_id(*facts), *facts, array("d", numbers).tobytes(), {"graph": b"form" * 50_000}, report
    )


def environment(ask: Ask) -> Kernel:
    made = kernel(ask)
    print("a build may print")
    facts = {"environment": dict(os.environ), "folder": str(Path.cwd()), "words": list(ask.words)}
    return Kernel(*(getattr(made, name) for name in Kernel.__slots__[:-1]), report=facts)


def endless(ask: Ask) -> Kernel:
    while True:
        pass


def asleep(ask: Ask) -> Kernel:
    time.sleep(600)
    return kernel(ask)


def slow(ask: Ask) -> Kernel:
    time.sleep(0.3)
    return kernel(ask)


def python_bomb(ask: Ask) -> Kernel:
    hoard = []
    while True:
        hoard.append(bytearray(1 << 22))


def children_bomb(ask: Ask) -> Kernel:
    """Spread over children, each below the limit of one process."""
    code = "x = bytearray(150 << 20); import time; time.sleep(60)"
    children = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    for child in children:
        child.wait()
    return kernel(ask)


def leaves_now(ask: Ask) -> Kernel:
    os._exit(3)


def segfaults(ask: Ask) -> Kernel:
    ctypes.string_at(0)
    return kernel(ask)


def dies_once(ask: Ask) -> Kernel:
    """Die where no earlier attempt left its mark."""
    mark = Path(ask.words[0])
    if mark.exists():
        return kernel(ask)
    mark.touch()
    os._exit(4)


def large_file(ask: Ask) -> Kernel:
    with open("large", "wb") as file:
        for _ in range(64):
            file.write(bytes(1 << 20))
    return kernel(ask)


def many_files(ask: Ask) -> Kernel:
    with contextlib.ExitStack() as stack:
        for _ in range(5000):
            stack.enter_context(open(os.devnull))
    return kernel(ask)


def connects(ask: Ask) -> Kernel:
    socket.create_connection((ask.words[0], int(ask.words[1])), timeout=5).close()
    return kernel(ask)


def connects_natively(ask: Ask) -> Kernel:
    """Go past Python: a child process does not have the audit hook."""
    code = f"import socket; socket.create_connection(({ask.words[0]!r}, {ask.words[1]}), timeout=5)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    raise CompileError(f"connected: {ran.returncode == 0} {ran.stderr[-200:]}")


def unforeseen(ask: Ask) -> Kernel:
    class Strange(BaseException):
        pass

    raise Strange("not an error anyone lists")


def wrong_id(ask: Ask) -> Kernel:
    made = kernel(ask)
    return Kernel("0" * 64, *(getattr(made, name) for name in Kernel.__slots__[1:]))


def no_kernel(ask: Ask) -> Kernel:
    return "a kernel"  # type: ignore[return-value]


def not_json(ask: Ask) -> Kernel:
    made = kernel(ask)
    return Kernel(*(getattr(made, name) for name in Kernel.__slots__[:-1]), report={"loss": math.nan})


def speaks_out_of_turn(ask: Ask) -> Kernel:
    """Write to every descriptor, the forge's pipe among them."""
    for number in range(3, 20):
        try:
            os.write(number, b"\xff" * 100)
        except OSError:
            continue
    return kernel(ask)


def leaves_a_child(ask: Ask) -> Kernel:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(ask.words[0]).write_text(str(child.pid))
    os._exit(5)


TASKS: dict[str, Callable[[Ask], Kernel]] = {
    made.__name__: made
    for made in (
        kernel, environment, endless, asleep, slow, python_bomb, children_bomb, leaves_now,
        segfaults, dies_once, large_file, many_files, connects, connects_natively, unforeseen, wrong_id,
        no_kernel, not_json, speaks_out_of_turn, leaves_a_child,
    )
}  # fmt: skip
