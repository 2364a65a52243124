"""``StreamPool``: on CUDA, kernels at a parallel port run beside the host's own layers.

The host's layers and a parallel kernel both start from x and meet only at the blend. A convolution on CUDA is
already asynchronous to Python; what a second stream may add is that two small ones share the device.
``benchmarks/streams.py`` says whether it does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from esper.errors import ConfigError


class Fork:
    """A kernel that may run beside what is launched between the fork and the join."""

    def __init__(
        self, x: Tensor, kernel: Callable[[Tensor], Tensor], stream: torch.cuda.Stream | None
    ) -> None:
        self.x, self.kernel, self.stream = x, kernel, stream
        self.ready: torch.cuda.Event | None = None
        self.version: int | None = None  # of x; inference tensors have none
        if stream is not None:
            self.ready = torch.cuda.Event()
            self.ready.record(torch.cuda.current_stream(x.device))
            self.version = None if x.is_inference() else x._version

    def join(self) -> Tensor:
        """Return the kernel's output, safe to use on the current stream; to be called once.

        The kernel is launched here, after the host's layers: random numbers are drawn and errors come up in
        the order of the sequential path. On the device it waits only for what stood before the fork, unless
        something has written over its input since.

        Raises:
            Exception: Whatever the kernel raised.
        """
        if self.stream is None or self.ready is None:
            return self.kernel(self.x)
        current = torch.cuda.current_stream(self.x.device)
        if self.version is not None and self.version == self.x._version:
            self.stream.wait_event(self.ready)
        else:
            self.stream.wait_stream(current)
        self.x.record_stream(self.stream)  # its memory is not handed out again while the kernel reads it
        try:
            with torch.cuda.stream(self.stream):
                f = self.kernel(self.x)  # autograd replays each backward operation on this stream
        finally:
            current.wait_stream(self.stream)
        f.record_stream(current)
        return f


class StreamPool:
    """Streams for parallel kernels, a few per device, made when first needed.

    Where there is nothing to gain or it cannot be done, a documented no-op: on the CPU, when switched off,
    while a graph is captured or compiled, the kernel simply runs when it is joined. Outputs and gradients
    are those of the sequential path in every case.

    Args:
        per_device: Streams per device; a kernel keeps the one it got first, so that its gradients always
            accumulate on one stream.
        enabled: Switch for streams at all; may be changed at any time.

    Raises:
        ConfigError: There is not even one stream.
    """

    def __init__(self, per_device: int = 2, enabled: bool = True) -> None:
        if per_device < 1:
            raise ConfigError(f"a pool needs at least 1 stream per device, got {per_device}")
        self.per_device, self.enabled = per_device, enabled
        self._streams: dict[torch.device, list[torch.cuda.Stream]] = {}
        self._turns: WeakKeyDictionary[Callable[[Tensor], Tensor], int] = WeakKeyDictionary()
        self._turn = 0
        self._lock = threading.Lock()

    def fork(self, x: Tensor, kernel: Callable[[Tensor], Tensor]) -> Fork:
        """Let ``kernel(x)`` run beside what is launched before the join.

        For example ``side = pool.fork(x, kernel); y = core(x); f = side.join()``.

        Args:
            x: Input of both host and kernel, (batch, …).
            kernel: A module or function.
        """
        usable = self.enabled and x.is_cuda and not torch.compiler.is_compiling()
        if not usable or torch.cuda.is_current_stream_capturing():
            return Fork(x, kernel, None)
        return Fork(x, kernel, self._stream(x.device, kernel))

    def _stream(self, device: torch.device, kernel: Callable[[Tensor], Tensor]) -> torch.cuda.Stream:
        with self._lock:
            streams = self._streams.get(device)
            if streams is None:
                streams = [torch.cuda.Stream(device) for _ in range(self.per_device)]
                self._streams[device] = streams
            if kernel not in self._turns:
                self._turns[kernel], self._turn = self._turn, self._turn + 1
            return streams[self._turns[kernel] % self.per_device]

    def __getstate__(self) -> dict[str, int]:
        """Leave the streams behind: a copy makes its own."""
        return {"per_device": self.per_device, "enabled": self.enabled}

    def __setstate__(self, state: dict[str, int]) -> None:
        """Start with no streams."""
        StreamPool.__init__(self, state["per_device"], bool(state["enabled"]))
