"""``Rehearsal``: runs one config undisturbed, then again with each fault, and compares."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from esper.errors import RunError
from esper.tolaria.chaos.child import FAULTS
from esper.tolaria.chaos.clock import real
from esper.tolaria.chaos.disk import Disk
from esper.tolaria.chaos.fault import Fault, Seen
from esper.tolaria.chaos.spec import Marks, Spec, read_marks

EARLIEST, LATEST = 0.4, 0.7  # share of the run before a fault comes: something was kept, something is left
SHARE = 10  # checkpoints of a run
PATIENCE = 60.0, 5.0  # a process hangs after so many seconds, and so many times the undisturbed run's
ROOM = 16 << 20, 40  # bytes of a disk, and so many times the weights': four checkpoints with Adam, a journal


@dataclass(frozen=True)
class Result:
    """What became of a run with one fault; None is "cannot be told", and a reason says why.

    Attributes:
        fault: Its name.
        survived: Whether the run ended by itself, with finite weights, and did what it should; None: the
            fault did not come.
        seconds: From the fault to the next training step.
        steps_lost: Steps done twice, or undone.
        equal: Whether the final weights are ``torch.equal`` to those of the undisturbed run.
        reason: Why the bits cannot be compared, where they cannot.
        what: What happened, in a line.
    """

    fault: str
    survived: bool | None
    seconds: float | None = None
    steps_lost: int | None = None
    equal: bool | None = None
    reason: str | None = None
    what: str = ""


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int | None  # None: it hung and was killed
    said: str  # the last line of its standard error


class Rehearsal:
    """Puts faults into runs of one config, each in processes and a folder of its own.

    Args:
        maker: What makes the trainer, see ``Spec.maker``.
        config: What is trained.
        folder: Where the runs go; nothing in it is overwritten.
        seed: Of everything that is drawn: when a fault comes, which bit it flips.
        epochs: Instead of the config's.
        tell: Told what is being done.

    Attributes:
        whole: What the undisturbed run wrote down; ``begin`` makes it.
        steps: Optimizer steps of a run.
    """

    def __init__(
        self,
        maker: str,
        config: Path,
        folder: Path,
        *,
        seed: int = 0,
        epochs: int | None = None,
        tell: Callable[[str], None],
    ) -> None:
        self.maker, self.config, self.folder, self.tell = maker, config.resolve(), folder.resolve(), tell
        self.seed, self.epochs = seed, epochs
        self.whole: Seen | None = None
        self.weights: Mapping[str, Tensor] = {}
        self.steps = 0
        self.seconds = 0.0  # of the undisturbed run

    def begin(self) -> None:
        """Run undisturbed.

        Raises:
            RunError: The run does not end by itself even so, or there is one in the folder already.
        """
        self.tell("the undisturbed run")
        spec, begun = self._spec("undisturbed"), real()
        ended = self._attempt(spec, timeout=None)
        self.seconds = real() - begun
        if ended.code != 0:
            raise RunError(f"{self.config} does not run even undisturbed: {ended.said}")
        self.whole = Seen(read_marks(Path(spec.marks)))
        self.weights = load_file(spec.weights)
        self.steps = len(self.whole.of("step"))

    def put(self, name: str) -> Result:
        """Run with one fault.

        Raises:
            RegistryError: There is no such fault.
        """
        fault: Fault = FAULTS.get(name)()
        if self.whole is None:
            self.begin()
        assert self.whole is not None
        if (absent := fault.absent(self.whole)) is not None:
            return Result(name, None, what=absent)
        self.tell(f"{name}: {fault.about}")
        draw = random.Random(f"{self.seed}:{name}")
        at = draw.randint(int(EARLIEST * self.steps) + 1, int(LATEST * self.steps) + 1)
        every = max(self.steps // SHARE, 1)
        spec = replace(self._spec(name), fault=name, at=at, every=every, growth=fault.growth)
        disk = self._disk(spec) if fault.mounts else None
        try:
            spec = replace(spec, namespace=None if disk is None else disk.process.pid)
            ended = self._attempts(spec, fault, draw)
        finally:
            if disk is not None:
                disk.close()
        return self._result(name, fault, ended, spec)

    def _spec(self, name: str) -> Spec:
        place = self.folder / name
        try:
            place.mkdir(parents=True)
        except FileExistsError:
            raise RunError(f"{place} is there already; give another --run-dir") from None
        return Spec(
            self.maker,
            str(self.config),
            run_dir=str(place / "run"),
            marks=str(place / "marks.jsonl"),
            weights=str(place / "weights.safetensors"),
            seed=self.seed,
            epochs=self.epochs,
        )

    def _disk(self, spec: Spec) -> Disk | None:
        fixed, times = ROOM
        size = fixed + times * sum(tensor.nbytes for tensor in self.weights.values())
        try:
            return Disk(Path(spec.run_dir), size)
        except RunError as error:
            self.tell(f"{spec.fault}: {error}; the storage will say so instead")
            return None

    def _attempts(self, spec: Spec, fault: Fault, draw: random.Random) -> list[Ended]:
        """Start the process, and again after a death as often as the fault allows."""
        fixed, times = PATIENCE
        ended: list[Ended] = []
        while len(ended) <= fault.restarts and not (ended and ended[-1].code in (0, None)):
            if ended:
                damage = fault.damage(Path(spec.run_dir) / "checkpoints", draw) if len(ended) == 1 else None
                if damage is not None:
                    Marks(spec.marks, len(ended))("damage", 0, what=damage)
            ended.append(self._attempt(replace(spec, attempt=len(ended)), fixed + times * self.seconds))
        return ended

    def _attempt(self, spec: Spec, timeout: float | None) -> Ended:
        place = Path(spec.marks).parent
        path, said = place / f"spec-{spec.attempt}.json", place / f"stderr-{spec.attempt}.txt"
        spec.write(path)
        with open(said, "wb") as errors:
            command = [sys.executable, "-m", "esper.tolaria.chaos", str(path)]
            with subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors
            ) as process:
                try:
                    code: int | None = process.wait(timeout)
                except subprocess.TimeoutExpired:
                    code = None
                finally:
                    process.kill()
        lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return Ended(code, lines[-1] if lines else "it said nothing")

    def _result(self, name: str, fault: Fault, ended: Sequence[Ended], spec: Spec) -> Result:
        seen = Seen(read_marks(Path(spec.marks)))
        last = ended[-1]
        if last.code != 0:
            how = "hung" if last.code is None else f"ended with {last.code}: {last.said}"
            when = "" if seen.struck is None else f"{seen.struck['what']} after step {seen.struck['step']}; "
            return Result(name, False, steps_lost=lost(seen), what=f"{when}process {len(ended)} {how}")
        if seen.struck is None:
            return Result(name, None, what="the run ended before the fault came")
        weights = load_file(spec.weights)
        finite = all(bool(torch.isfinite(t).all()) for t in weights.values() if t.is_floating_point())
        verdict = fault.judge(seen)
        equal = None if fault.different is not None else same(weights, self.weights)
        what = verdict.what if finite else f"{verdict.what}; the final weights are not finite"
        survived = verdict.survived and finite
        return Result(name, survived, seconds(seen), lost(seen), equal, fault.different, what)

    def sweep(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)


def seconds(seen: Seen) -> float | None:
    """Return the time from the fault to the next step that counts: after a restart, or a way back."""
    struck = seen.struck
    if struck is None:
        return None
    last = max(mark["attempt"] for mark in seen.marks)
    back = [mark["at"] for mark in seen.events("rolled_back") if mark["at"] >= struck["at"]]
    since = max([struck["at"], *back[:1]])
    steps = [m["at"] for m in seen.of("step") if m["at"] > since and m["attempt"] >= (last if last else 0)]
    return steps[0] - struck["at"] if steps else None


def lost(seen: Seen) -> int:
    """Count the steps that were done again by a later process, and those that the governor undid."""
    count = sum(int(mark["data"]["lost"]) for mark in seen.events("rolled_back"))
    steps = seen.of("step")
    for before, after in pairwise(steps):
        if after["attempt"] > before["attempt"]:
            count += before["step"] - (after["step"] - 1)
    return count


def same(weights: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Tell whether two models are equal, bit for bit."""
    return weights.keys() == others.keys() and all(torch.equal(t, others[k]) for k, t in weights.items())
