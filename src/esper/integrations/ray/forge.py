"""``RayForge``: kernels built on a Ray cluster.

Every worker is an actor that keeps a worker process of its own node, so a build is held to the same limits
as in a local forge. What travels are the forge's own frames: JSON and bytes. The nodes must have Esper and
the build function installed.
"""

from __future__ import annotations

import threading
from dataclasses import asdict
from typing import Any

from esper.contracts import Observer, ignore
from esper.errors import MissingExtraError
from esper.tezzeret.forge import BUILD, Build, Forge
from esper.tezzeret.limits import Limits
from esper.tezzeret.process import Death, Worker, WorkerProcess
from esper.tezzeret.wire import Frame

try:
    import ray
    from ray.exceptions import GetTimeoutError, RayError
except ImportError:
    raise MissingExtraError("ray", "ray", "building kernels on a Ray cluster") from None

GRACE = 30.0  # seconds the cluster may take beyond what a build may: scheduling and transfer
_joining = threading.Lock()  # one ray.init for each process


class RayForge(Forge):
    """A forge whose workers are actors of a Ray cluster; everything else is as in :class:`Forge`.

    The cluster is joined with the first request, or by ``start()``, unless the program called ``ray.init``
    before. A cluster this forge had to start stays until the program ends or calls ``ray.shutdown()``: others
    may have come to use it.

    Args:
        build: Builder, importable on every node, or its ``"module:function"``.
        warm: Function a worker calls once before its first build, likewise.
        workers: Largest number of actors; each takes one CPU of the cluster.
        limits: Limits of each on its node; None: the usual ones.
        retries: Number of further attempts after a worker, actor or node died.
        address: Address of the cluster, as ``ray.init`` takes it; None finds a running one or starts one
            here.
        observe: Function told about workers that died.

    Raises:
        ConfigError: A number is out of range.
        ForgeError: ``build`` cannot be imported by a worker.
    """

    def __init__(
        self,
        build: Build | str = BUILD,
        *,
        warm: str | None = None,
        workers: int = 1,
        limits: Limits | None = None,
        retries: int = 1,
        address: str | None = None,
        observe: Observer = ignore,
    ) -> None:
        super().__init__(build, warm=warm, workers=workers, limits=limits, retries=retries, observe=observe)
        self.address = address

    def new_worker(self) -> Worker:
        """Make an actor's stand-in; the actor is made when it is started."""
        return ActorWorker(self.build, self.warm, self.limits, self.address)


class Smithy:
    """What runs on a node: one worker process, kept warm; answers are plain JSON values and bytes."""

    def __init__(self, build: str, warm: str | None, limits: dict[str, Any]) -> None:
        self.worker = WorkerProcess(build, warm, Limits(**limits), None)

    def start(self) -> dict[str, object]:
        """Start and warm up the process."""
        return self.told(self.worker.start())

    def forge(self, frame: bytes) -> dict[str, object]:
        """Answer one request."""
        return self.told(self.worker.forge(frame))

    def told(self, answer: Frame | Death | None) -> dict[str, object]:
        """Write an answer as plain values."""
        facts: dict[str, object] = {"held": self.worker.held, "peak": self.worker.peak}
        if isinstance(answer, Death):
            return {**facts, "death": asdict(answer)}
        return {**facts, "frame": answer}

    def close(self) -> None:
        """End the process and remove its folder."""
        self.worker.close()


class ActorWorker:
    """The forge's side of one actor."""

    def __init__(self, build: str, warm: str | None, limits: Limits, address: str | None) -> None:
        self.build, self.warm, self.limits, self.address = build, warm, limits, address
        self.held: dict[str, str] = {}
        self.peak: int | None = None
        self._actor: Any = None  # Ray has no types for it
        self._stopped: str | None = None
        self._lock = threading.Lock()

    def start(self) -> Death | None:
        """Join the cluster, place an actor and warm it up, where that was not done."""
        if self._actor is not None:
            return None
        try:
            with _joining:
                if not ray.is_initialized():
                    ray.init(address=self.address, log_to_driver=False, include_dashboard=False)
            place = ray.remote(Smithy).options(num_cpus=1)
            actor = place.remote(self.build, self.warm, asdict(self.limits))
        except (ConnectionError, RayError, RuntimeError, ValueError) as error:
            return Death(f"no actor could be placed on the Ray cluster: {error}", again=True)
        with self._lock:
            self._actor = actor
            if self._stopped is not None:
                ray.kill(actor)
        answer = self._ask(actor.start.remote(), self.limits.start)
        return answer if isinstance(answer, Death) else None

    def forge(self, frame: bytes) -> Frame | Death:
        """Have the actor answer a request."""
        death = self.start()
        if death is not None:
            return death
        answer = self._ask(self._actor.forge.remote(frame), self.limits.start + self.limits.wall)
        if isinstance(answer, Death):
            return answer
        assert answer is not None  # of a request, not of a start
        header, parts = answer
        return dict(header), dict(parts)

    def stop(self, reason: str | None) -> None:
        """Kill the actor; its process goes with it."""
        with self._lock:
            self._stopped = reason
            if reason is not None and self._actor is not None:
                ray.kill(self._actor)

    def close(self) -> None:
        """Let the actor clean up if it lives, and end it."""
        with self._lock:
            actor, self._actor = self._actor, None
        if actor is None or not ray.is_initialized():
            return
        try:
            ray.get(actor.close.remote(), timeout=GRACE)
        except RayError:  # it is dead already: its process died with it
            return
        ray.kill(actor)

    def _ask(self, told: ray.ObjectRef, seconds: float) -> Frame | Death | None:
        """Wait for an answer of the actor; one that is gone is forgotten, so that the next is a new one."""
        try:
            answer = ray.get(told, timeout=seconds + GRACE)
        except GetTimeoutError:
            self.close()
            return Death(f"the Ray cluster gave no answer for {seconds + GRACE:g} s", again=True)
        except RayError as error:
            with self._lock:
                self._actor = None
                if self._stopped is not None:
                    return Death(self._stopped, again=False)
            return Death(f"the actor died: {error}", again=True)
        self.held, self.peak = answer["held"], answer["peak"]
        return Death(**answer["death"]) if "death" in answer else answer["frame"]
