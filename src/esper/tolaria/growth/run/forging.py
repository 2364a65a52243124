"""Between the kernels that grow and the forge that compiles them; training never waits for either.

A kernel begins to run eagerly. Its request is filed and forgotten; a thread of its own asks the tiers in
order (device cache, folder, forge) and reads the compiled form; at a later step boundary the form takes the
program's place. The weights stay where they are, so the optimizer never notices.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Thread

from torch import Tensor

from esper.blueprints.kernel import GraphKernel, LiveKernel
from esper.blueprints.program import Form
from esper.config import Kernels
from esper.contracts import Event, Kernel, KernelStore, Observer
from esper.errors import EsperError, KernelError
from esper.kasmina.branches.blocks import Block
from esper.kasmina.seeds.cache import KernelCache
from esper.kasmina.widths.places import Place
from esper.tezzeret.build import KernelRequest, request_id, revive
from esper.tezzeret.container import open_sealed, seal
from esper.tezzeret.forge import Forge
from esper.tezzeret.signing import load_key
from esper.urza.folder import FolderStore, default_folder

EAGER = "eager"
DEVICE_BYTES = 256 * 2**20  # of compiled forms kept ready; one takes some hundred kilobytes


@dataclass(frozen=True, slots=True)
class Compiled:
    """A form ready to run, and where it came from."""

    form: Form | None  # None: eager was the fastest
    pipeline: str
    speedup: float | None  # over eager, forward and backward; None where nothing was timed
    source: str  # "store" or "forge"


@dataclass(slots=True)
class Order:
    """A form on its way to a kernel."""

    kernel: GraphKernel
    site: str
    begun: float
    answer: Future[Compiled] = field(default_factory=Future)


class Forging:
    """Files requests for kernels and hands their compiled forms over.

    Args:
        settings: Pipeline, store, budget.
        observe: Told of forms handed over and of every failure, which leaves the kernel running eagerly.
    """

    def __init__(self, settings: Kernels, observe: Observer) -> None:
        self.settings, self.observe = settings, observe
        self.orders: list[Order] = []
        self.swapped: list[GraphKernel] = []
        self.forge: Forge | None = None
        if settings.pipeline != EAGER:
            self.forge = Forge(observe=observe)
            self.forge.start()  # a worker takes seconds to import torch
        self.cache: KernelCache[Compiled] = KernelCache(self._missing, DEVICE_BYTES, size_of=lambda _: 2**18)

    # -- on the training thread ------------------------------------------------------------------------------

    def file(self, kernel: LiveKernel, place: Place, hidden: int, x: Tensor | None) -> None:
        """Ask for a kernel's compiled form; returns at once, whatever it takes."""
        if self.settings.pipeline == EAGER or not isinstance(kernel, GraphKernel) or x is None:
            return
        assert isinstance(place, Block)
        request = KernelRequest(
            graph=place.graph.to_json(),
            signature=place.signature,
            hidden=hidden,
            seed=0,  # forms take weights as arguments: one serves every seed
            shape=tuple(x.shape),
            pipeline=self.settings.pipeline,
            device=x.device.type,
            budget_seconds=self.settings.budget_seconds,
            deterministic=self.settings.deterministic,
        )
        order = Order(kernel, place.site.name, time.perf_counter())
        self.orders.append(order)  # a daemon: a run that ends early does not wait for a compiler
        Thread(target=self._answer, args=(order, request), name="esper-forging", daemon=True).start()

    def collect(self, step: int) -> None:
        """Let kernels whose forms have come run them from now on."""
        for order in [o for o in self.orders if o.answer.done()]:
            self.orders.remove(order)
            try:
                made = order.answer.result()
            except (EsperError, OSError, RuntimeError) as error:
                self._tell(step, "fallback", what="compile", why=f"{order.site} goes on eagerly: {error}")
                continue
            order.kernel.swap(made.form, made.pipeline)
            self.swapped.append(order.kernel)
            self._tell(
                step,
                "compiled",
                site=order.site,
                kernel=made.source,
                pipeline=made.pipeline,
                milliseconds=(time.perf_counter() - order.begun) * 1e3,
                speedup=made.speedup,
            )

    def close(self) -> None:
        """Let every kernel run its plain program again, forget what is on its way and end the forge."""
        for kernel in self.swapped:
            kernel.swap(None, EAGER)
        self.swapped.clear()
        self.orders.clear()
        if self.forge is not None:
            self.forge.close()

    def _tell(self, step: int, kind: str, **data: object) -> None:
        self.observe(Event(kind, step, data))

    # -- on an order's thread --------------------------------------------------------------------------------

    def _answer(self, order: Order, request: KernelRequest) -> None:
        try:
            key = request_id(request), request.device
            order.answer.set_result(self.cache.get(key, lambda _: self._load(request, key[0])))
        except (EsperError, OSError, RuntimeError) as error:  # told at the next boundary
            order.answer.set_exception(error)

    def _missing(self, key: object) -> Compiled:
        raise KernelError(f"kernel {key} was asked for without its request")

    def _load(self, request: KernelRequest, kernel_id: str) -> Compiled:
        store = FolderStore(self.settings.store or default_folder())
        key = load_key(store=store.folder, create=True)
        kept = stored(store, key, kernel_id)
        kernel = kept if kept is not None else self._forge(request)
        if kept is None:
            store.put(kernel.id, seal(kernel, key))
        _, _, form = revive(kernel)
        source = "forge" if kept is None else "store"
        return Compiled(form, str(kernel.report["pipeline"]), speedup(kernel.report), source)

    def _forge(self, request: KernelRequest) -> Kernel:
        assert self.forge is not None
        return self.forge.submit(request).result()


def stored(store: KernelStore, key: bytes, kernel: str) -> Kernel | None:
    """Return a kernel of the store; one that is damaged or not signed by us is a miss."""
    try:
        container = store.get(kernel)
        return None if container is None else open_sealed(container, key, kernel)
    except KernelError:
        return None


def speedup(report: Mapping[str, object]) -> float | None:
    """Return how much faster than eager the form was when it was chosen."""
    candidates = report.get("candidates")
    figures = candidates.get(report.get("pipeline")) if isinstance(candidates, Mapping) else None
    measured = figures.get("speedup") if isinstance(figures, Mapping) else None
    return measured if isinstance(measured, float | int) else None
