"""``Rehearsal``: runs one config undisturbed, then again with each fault, and compares."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from esper.chaos.child import FAULTS
from esper.chaos.clock import real
from esper.chaos.disk import Disk
from esper.chaos.fault import Fault, Seen
from esper.chaos.measures import finite, lost, same, seconds
from esper.chaos.processes import Ended, run
from esper.chaos.spec import Marks, Spec, read_marks
from esper.errors import RunError

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
        what: Line on what happened.
    """

    fault: str
    survived: bool | None
    seconds: float | None = None
    steps_lost: int | None = None
    equal: bool | None = None
    reason: str | None = None
    what: str = ""


@dataclass(frozen=True)
class Undisturbed:
    """What a run is compared with."""

    seen: Seen
    weights: Mapping[str, Tensor]
    seconds: float

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        return len(self.seen.of("step"))


class Rehearsal:
    """Puts faults into runs of one config, each in processes and a folder of its own.

    Args:
        maker: ``module:callable`` that makes the trainer, see ``Spec.maker``.
        config: Path of the config that says what is trained.
        folder: Path of the folder the runs go to; nothing in it is overwritten.
        seed: Seed of everything that is drawn: when a fault comes, which bit it flips.
        epochs: Number of epochs, instead of the config's.
        tell: Function told in words what is being done.
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
        self.whole: dict[int, Undisturbed] = {}  # by how many processes train together

    def undisturbed(self, ranks: int = 1) -> Undisturbed:
        """Run without a fault, once.

        Raises:
            RunError: The run does not end by itself even so, or there is one in the folder already.
        """
        if ranks not in self.whole:
            self.tell(f"the undisturbed run{f' in {ranks} processes' if ranks > 1 else ''}")
            spec = replace(self._spec("undisturbed" + (f"-{ranks}" if ranks > 1 else "")), ranks=ranks)
            begun = real()
            ended = run(spec, timeout=None)
            if ended.code != 0:
                raise RunError(f"{self.config} does not run even undisturbed: {ended.said}")
            seen = Seen(read_marks(Path(spec.marks)))
            self.whole[ranks] = Undisturbed(seen, load_file(spec.weights), real() - begun)
        return self.whole[ranks]

    def put(self, name: str) -> Result:
        """Run with one fault.

        Raises:
            RegistryError: There is no such fault.
        """
        fault: Fault = FAULTS.get(name)()
        try:
            whole = self.undisturbed(fault.ranks)
        except RunError as error:
            if fault.ranks == 1:
                raise
            return Result(name, None, what=f"not available in {fault.ranks} processes: {error}")
        if (absent := fault.absent(whole.seen)) is not None:
            return Result(name, None, what=absent)
        self.tell(f"{name}: {fault.about}")
        draw = random.Random(f"{self.seed}:{name}")
        at = draw.randint(int(EARLIEST * whole.steps) + 1, int(LATEST * whole.steps) + 1)
        spec = replace(
            self._spec(name),
            fault=name,
            at=at,
            every=max(whole.steps // SHARE, 1),
            growth=fault.growth,
            ranks=fault.ranks,
            relaunches=fault.relaunches,
        )
        disk = self._disk(spec, whole) if fault.mounts else None
        try:
            spec = replace(spec, namespace=None if disk is None else disk.process.pid)
            ended = self._attempts(spec, fault, draw, whole)
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

    def _disk(self, spec: Spec, whole: Undisturbed) -> Disk | None:
        fixed, times = ROOM
        size = fixed + times * sum(tensor.nbytes for tensor in whole.weights.values())
        try:
            return Disk(Path(spec.run_dir), size)
        except RunError as error:
            self.tell(f"{spec.fault}: {error}; the storage will say so instead")
            return None

    def _attempts(self, spec: Spec, fault: Fault, draw: random.Random, whole: Undisturbed) -> list[Ended]:
        """Start the process, and again after a death as often as the fault allows."""
        fixed, times = PATIENCE
        ended: list[Ended] = []
        while len(ended) <= fault.restarts and not (ended and ended[-1].code in (0, None)):
            if len(ended) == 1:
                damage = fault.damage(Path(spec.run_dir) / "checkpoints", draw)
                if damage is not None:
                    Marks(spec.marks, len(ended))("damage", 0, what=damage)
            ended.append(run(replace(spec, attempt=len(ended)), fixed + times * whole.seconds))
        return ended

    def _result(self, name: str, fault: Fault, ended: Sequence[Ended], spec: Spec) -> Result:
        seen, last = Seen(read_marks(Path(spec.marks))), ended[-1]
        if last.code != 0:
            how = "hung" if last.code is None else f"ended with {last.code}: {last.said}"
            when = "" if seen.struck is None else f"{seen.struck['what']} after step {seen.struck['step']}; "
            return Result(name, False, steps_lost=lost(seen), what=f"{when}process {len(ended)} {how}")
        if seen.struck is None:
            return Result(name, None, what="the run ended before the fault came")
        weights, verdict = load_file(spec.weights), fault.judge(seen)
        sound = finite(weights)
        equal = None if fault.different is not None else same(weights, self.whole[fault.ranks].weights)
        what = verdict.what if sound else f"{verdict.what}; the final weights are not finite"
        survived = verdict.survived and sound
        return Result(name, survived, seconds(seen), lost(seen), equal, fault.different, what)

    def sweep(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)
