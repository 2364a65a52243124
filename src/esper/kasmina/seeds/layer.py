"""``KasminaLayer``: where a site's awake kernel lives, and the one place it may touch the host's output."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper.blueprints.kernel import LiveKernel
from esper.errors import SiteError, StateError
from esper.kasmina.seeds.compiling import blended
from esper.kasmina.seeds.differentiated import differentiated_by
from esper.kasmina.seeds.private_api import aloof, on_the_way_back
from esper.kasmina.seeds.streams import Fork, StreamPool
from esper.kasmina.widths.pairs import Pair
from esper.kasmina.widths.places import Place
from esper.surgery.isolation.contexts import borrowed_buffers
from esper.surgery.isolation.seam import open_seam

Branch = Callable[[Tensor], Tensor]
# What a pass leaves behind in a layer.
PASSING = ("tap", "x", "through", "sampling", "sample", "finite", "failed", "fork", "exposed")


@dataclass(slots=True)
class Tap:
    """What one training pass showed at a site; gradients arrive with the backward pass."""

    x: Tensor | None = None  # what a kernel would read, detached
    version: int = 0  # of x; an in-place operation behind the tap moves it on
    scale: Tensor | None = None  # root mean square of the exit's output, 0-dim
    gradient: Tensor | None = None  # of the loss for that output

    def receive(self, gradient: Tensor) -> None:
        """Note the gradient; a hook."""
        self.gradient = gradient.detach()

    def fresh(self) -> bool:
        """Tell whether the pass went forth and back and nothing has written over the input since."""
        return self.gradient is not None and self.x is not None and self.x._version == self.version


class KasminaLayer(nn.Module):
    """Passes a site's output through: as it is, or with the kernel's part added.

    The layer hangs under ``MorphableModel``, not under the host, whose containers would otherwise run it. Two
    seams share it: the entry's input is kept until the exit's output comes. A serial kernel reads that output
    itself.

    Args:
        place: The site.
        on_fault: Function that is told the reason when a kernel raised or went non-finite and the
            host's own output was used instead.
        pool: Streams for a parallel kernel on CUDA.
    """

    def __init__(self, place: Place, on_fault: Callable[[str], None], pool: StreamPool | None = None) -> None:
        super().__init__()
        object.__setattr__(self, "place", place)
        self.place: Place
        self.serial = place.port == "serial"
        self.on_fault, self.pool = on_fault, pool
        self.fork: Fork | None = None
        self.kernel: LiveKernel | None = None
        self.alpha: Tensor | None = None  # 0-dim row of the state layout
        self.exposed = False  # alpha > 0, without reading the tensor
        self.tap: Tap | None = None
        self.shown: tuple[Branch | None] | None = None  # in a shadow pass: stands for the kernel, at alpha 1
        self.x: Tensor | None = None
        self.through = False  # whether the latest pass's input is one that the user differentiates by
        self.sampling = False  # whether the next pass notes what the kernel gave and how long it took
        self.sample: tuple[Tensor, float] | None = None  # output, milliseconds
        self.finite: Tensor | None = None  # in a graph: whether the kernel's last output was; nobody waited
        self.failed = ""  # what it raised where nothing may be counted at that moment
        self.closers: list[Callable[[], None]] = []

    def open(self) -> None:
        """Put seams at both ends."""
        if not self.closers:
            entry, exit_ = self.place.ends()
            self.closers = [open_seam(entry, "entry", self), open_seam(exit_, "exit", self)]
            if isinstance(self.place, Pair):
                self.closers += [open_seam(module, "slow", self) for module in self.place.fast]

    def shut(self) -> None:
        """Take the seams away; what is awake stays awake."""
        while self.closers:
            self.closers.pop()()
        self.__dict__["x"] = None

    def close(self) -> None:
        """Take the seams away; both modules are exactly as before."""
        self.shut()
        self.kernel = None
        own = {"tap": None, "shown": None, "fork": None, "sample": None, "alpha": None, "exposed": False}
        own["through"] = False
        self.__dict__.update(own)  # past nn.Module.__setattr__, 1.5 µs each

    def __getstate__(self) -> dict[str, object]:
        """Leave behind the last pass, which may hang on a graph, and whoever is told of faults."""
        return {
            **self.__dict__,
            "x": None,
            "finite": None,
            "fork": None,
            "sample": None,
            "tap": None,
            "shown": None,
            "on_fault": unheard,
        }

    def part(self) -> Mapping[str, Tensor] | None:
        """Return α and the kernel's tensors while they take part in the output."""
        if not self.exposed:
            return None
        assert self.kernel is not None and self.alpha is not None
        return {"alpha": self.alpha, **self.kernel.state_dict(keep_vars=True)}

    def enter(self, x: Tensor | None) -> None:
        """Keep the entry's input until the next pass, so that a checkpointed exit can be recomputed."""
        if torch.compiler.is_compiling():
            self.x = x
            return
        self.__dict__["x"] = x  # past nn.Module.__setattr__, which looks for a parameter: 1.5 µs
        if self.exposed and self.pool is not None and self.pool.enabled and not self.serial and x is not None:
            assert self.kernel is not None
            if differentiated_by(x):
                return
            self.fork = self.pool.fork(x.detach(), self.kernel)

    def leave(self, y: Tensor) -> Tensor:
        """Return what stands for the exit's output."""
        x = y if self.serial else self.x
        if x is None:
            why = f"{self.place.site.name}: the exit ran before the entry; exclude this site"
            if self.shown is not None:
                raise SiteError(why)
            if self.exposed:  # a pass of the user's, who may have replaced the entry just now
                self.on_fault(why)
            return y
        if self.shown is not None:
            (branch,) = self.shown
            if branch is None:
                return y
            read = self.read(x)
            return (y if self.through else y.detach()) + branch(read).to(y.dtype)
        # In a graph a hook would break it: without a tap every lesson is a shadow pass.
        if self.tap is not None and torch.is_grad_enabled() and not aloof():
            self.watch(self.tap, x, y)
        return self.blend(x, y) if self.exposed else y

    def read(self, x: Tensor) -> Tensor:
        """Return what a kernel reads: detached until it is kept (measured: costs nothing).

        Where the user differentiates by an input, as physics-informed losses and gradient penalties do, the
        kernel's part belongs to the derivative. A checkpoint runs again on the way back, and goes by
        what was found before.
        """
        if not on_the_way_back():
            self.__dict__["through"] = differentiated_by(x)
        return x if self.through else x.detach()

    def blend(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y + α·k(x)."""
        kernel, alpha = self.kernel, self.alpha  # once: a module in a module is looked up slowly, 0.7 µs
        assert kernel is not None and alpha is not None
        if torch.compiler.is_compiling():
            if torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting():
                raise StateError("the branch that Esper is letting in needs torch.export with strict=False")
            y, self.finite = blended(y, kernel(x.detach()), alpha)
            return y
        if aloof():
            return self.apart(kernel, alpha, x.detach(), y)
        try:
            read = self.read(x)
            plain = self.fork is None and not self.sampling
            f = kernel(read) if plain else self.watched(kernel, read)
            # One number is read, not a tensor of verdicts: 3.5 µs where isfinite and bool take 11.
            finite = math.isfinite(f.detach().sum(dtype=torch.float32).item())
        except Exception as error:  # whatever a kernel does, training goes on
            self.on_fault(f"{type(error).__name__}: {error}")
            return y
        if not finite:
            self.on_fault("a non-finite output")
            return y
        if y.dtype != alpha.dtype or f.dtype != y.dtype:  # two calls that do nothing take 2 µs
            alpha, f = alpha.to(y.dtype), f.to(y.dtype)
        return torch.addcmul(y, alpha, f)

    def apart(self, kernel: LiveKernel, alpha: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return the same where torch transforms the pass: no number can be read meanwhile.

        Raises:
            StateError: It traces: a trace knows the user's modules only, and ends the process on parameters
                of others (seen: a segmentation fault in torch 2.13).
        """
        if torch.jit.is_tracing():
            raise StateError(
                f"torch.jit.trace cannot hold the branch that is being let in at {self.place.site.name}; "
                "trace the model when growth.finish() has decided it, or use torch.export"
            )
        self.fork = None
        try:
            f = kernel(x)
        except Exception as error:  # whatever a kernel does, training goes on
            self.failed = f"{type(error).__name__}: {error}"
            return y
        return blended(y, f, alpha)[0]

    def watched(self, kernel: LiveKernel, x: Tensor) -> Tensor:
        """Run the kernel on its stream if it has one, and note it if asked to; on CUDA launches are timed."""
        fork, self.fork = self.fork, None
        begun = time.perf_counter()
        f = kernel(x) if fork is None else fork.join()
        if self.sampling:
            self.sample = f.detach(), (time.perf_counter() - begun) * 1e3
        return f

    def told(self) -> None:
        """Let go of what the last pass read, and pass on what a graph noted of it; asked between steps."""
        self.__dict__["x"] = None
        finite, self.finite = self.finite, None
        failed, self.failed = self.failed, ""
        if failed or (finite is not None and not bool(finite)):
            self.on_fault(failed or "a non-finite output")

    def watch(self, tap: Tap, x: Tensor, y: Tensor) -> None:
        """Note input, output and, once it flows back, the gradient."""
        tap.x, tap.version, tap.gradient = x.detach(), x._version, None
        tap.scale = y.detach().square().mean().sqrt()
        if y.requires_grad:
            y.register_hook(tap.receive)

    @contextmanager
    def aside(self, hidden: bool = False) -> Iterator[None]:
        """Let passes for another seed's sake run through, and leave no trace of them here.

        Args:
            hidden: Whether an exposed kernel takes no part in them.
        """
        kept = {name: self.__dict__[name] for name in PASSING if hidden or name != "exposed"}
        self.__dict__.update(tap=None, sampling=False, fork=None)
        if hidden:
            self.exposed = False
        try:
            with nullcontext() if self.kernel is None else borrowed_buffers(self.kernel):
                yield
        finally:
            self.__dict__.update(kept)

    @contextmanager
    def showing(self, branch: Branch | None) -> Iterator[None]:
        """Run passes with another branch in place, at full strength on detached features, or with none."""
        before, self.shown = self.shown, (branch,)
        transient = not self.closers
        try:
            self.open()
            yield
        finally:
            self.shown = before
            if transient:
                self.shut()


def unheard(error: str) -> None:
    """Warn of a fault in a copy, which no orchestrator watches."""
    warnings.warn(
        f"a kernel failed in a copy of a growing model, whose own output was used: {error}", stacklevel=2
    )
