"""A plain training loop around a growing model, for those who do not want to write their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sized
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DistributedSampler

from esper.batches.axes import BatchAxis
from esper.batches.examples import LossFunction, count_examples
from esper.checkpoint import Batches, CheckpointManager, Run, Storage
from esper.checkpoint.cadence import Every
from esper.checkpoint.checkpoints import ASKED, Judge
from esper.checkpoint.contents.run import Stateful
from esper.checkpoint.format.manifest import Manifest
from esper.checkpoint.retention import Best
from esper.config import ConfigLike
from esper.contracts import Observer, ignore
from esper.errors import ConfigError, FinishedError, ProbeError, StateError
from esper.kasmina.sites.sites import Sites
from esper.nissa.run.journal import RunJournal
from esper.storage.address import storage_at
from esper.tolaria.growth import grow
from esper.tolaria.growth.begin import put_down, take_back
from esper.tolaria.training import KEPT, SAVED, refuse_keeping, refuse_training

Metric = Callable[[nn.Module, Any], float | Tensor]


class TrainerState(TypedDict):
    """What a trainer itself knows."""

    history: list[dict[str, float]]  # per epoch
    sums: list[Tensor | int]  # of the present epoch: loss times examples, a scalar; examples


class Trainer:
    """Trains a model while it grows.

    Args:
        model: Module that grows in place. In several processes (torchrun) what each of them calls:
            ``DistributedDataParallel`` around it, or the module after ``fully_shard``.
        optimizer: One, or several by name.
        loss_fn: ``loss_fn(model, batch)``, the scalar to minimise; it moves the batch to the model's device.
        train: Training batches, iterated once per epoch; each process gives its own share of them.
        probe: Batches held out of the training data, on which growth is decided.
        epochs: Passes over ``train``.
        val: Batches for ``metrics``, evaluated after each epoch; None evaluates nothing.
        scheduler: A learning-rate scheduler of the optimizer.
        scheduler_interval: Whether the scheduler moves once per ``"epoch"`` or per ``"step"``.
        metrics: ``metric(model, batch)`` by name, averaged over the examples of ``val``; the loss is one.
        batch_axis: Axis of the examples in a batch's tensors, as for ``esper.grow``.
        sites: Places where the model may grow, as for ``esper.grow``.
        growth: Way to grow, in place of what the settings say, as for ``esper.grow``.
        config: Settings, a mapping, or a path to a YAML file.
        run_dir: Folder of the run's events, or an open journal.
        seed: Seed of all choices growth makes; the model and the data have their own.
        on_event: Called with every event.
        checkpoints: A folder or another storage of checkpoints; None keeps none.
        every: Optimizer steps, or a ``timedelta``, between checkpoints; None: from their measured cost.
        keep: Number of the newest checkpoints that stay.
        best: ``("train_loss", "min")``: the best checkpoint stays besides. With ``val`` also the loss there
            or a metric, ``("loss", "min")``: one is then taken after each epoch that is the best so far.
        milestones: Whether checkpoints also come soon after the beginning and whenever the model has grown;
            None: only where ``every`` is None. One at the end always does.
        settings: Values that describe the run, any plain values; kept in checkpoints and compared on resume.

    Attributes:
        growth: The ``esper.Growth`` at work: what has grown, what it cost, ``save``.
        history: One mapping per epoch: ``epoch``, ``train_loss`` and the metrics.
        stopped: Whether ``fit`` came back early, because of ``stop``.

    Raises:
        EsperError: Whatever is given does not fit; nothing was changed then.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Mapping[str, Optimizer],
        loss_fn: LossFunction,
        *,
        train: Iterable[object],
        probe: Iterable[object],
        epochs: int,
        val: Iterable[object] | None = None,
        scheduler: LRScheduler | None = None,
        scheduler_interval: Literal["epoch", "step"] = "epoch",
        metrics: Mapping[str, Metric] | None = None,
        batch_axis: BatchAxis | None = None,
        sites: Sites = "auto",
        growth: Literal["auto", "early", "incubate", "off"] | None = None,
        config: ConfigLike = None,
        run_dir: str | Path | RunJournal | None = None,
        seed: int = 0,
        on_event: Observer = ignore,
        checkpoints: Storage | str | Path | None = None,
        every: Every = None,
        keep: int | None = KEPT,
        best: Best | None = None,
        milestones: bool | None = None,
        settings: object = None,
    ) -> None:
        refuse_training(
            train=train,
            val=val,
            epochs=epochs,
            scheduler=scheduler,
            scheduler_interval=scheduler_interval,
            metrics=metrics,
        )
        self.metrics: dict[str, Metric] = {"loss": loss_fn, **(metrics or {})}
        refuse_keeping(
            checkpoints=checkpoints,
            every=every,
            keep=keep,
            best=best,
            measured=None if val is None else self.metrics,
        )
        storage = None if checkpoints is None else storage_at(checkpoints)
        self.batches: Batches[object] | None = None if storage is None else Batches(train)
        self.model, self.loss_fn, self.train, self.val, self.epochs = model, loss_fn, train, val, epochs
        self.scheduler, self.scheduler_interval, self.best = scheduler, scheduler_interval, best
        self.history: list[dict[str, float]] = []
        self.optimizers = list(optimizer.values()) if isinstance(optimizer, Mapping) else [optimizer]
        try:
            steps = epochs * len(train) if isinstance(train, Sized) else None
        except TypeError:  # a DataLoader over an iterable dataset has a __len__ that raises
            steps = None
        self.growth = grow(
            model,
            optimizer,
            loss_fn,
            probe=probe,
            batch_axis=batch_axis,
            steps=steps,
            schedulers=() if scheduler is None else (scheduler,),
            sites=sites,
            growth=growth,
            config=config,
            run_dir=run_dir,
            seed=seed,
            on_event=on_event,
        )
        self._done = self.stopped = self._asked_to_stop = False
        # Of the present epoch: loss times examples, a scalar, and examples.
        self._sums: tuple[Tensor, int] = torch.zeros(()), 0
        self.manager: CheckpointManager | None = None
        if storage is None:
            return
        try:
            self.manager = self._keeping(storage, optimizer, settings, every, keep, best, milestones)
        except BaseException:  # whatever ends it, nothing began
            take_back(self.growth)
            raise

    def _keeping(
        self,
        storage: Storage,
        optimizer: Optimizer | Mapping[str, Optimizer],
        settings: object,
        every: Every,
        keep: int | None,
        best: Best | None,
        milestones: bool | None,
    ) -> CheckpointManager:
        """Make what keeps checkpoints of this run.

        Raises:
            StateError: Another run keeps its own there.
        """
        others: dict[str, Stateful] = {"trainer": self}
        others |= {} if self.scheduler is None else {"scheduler": self.scheduler}
        named = optimizer if isinstance(optimizer, Mapping) else {"optimizer": optimizer}
        run = Run(self.model, named, growth=self.growth, others=others, batches=self.batches, config=settings)
        return CheckpointManager(storage, run, every=every, keep=keep, best=best, milestones=milestones)

    def resume(self, judge: Judge | None = None) -> Manifest | None:
        """Go on from the newest checkpoint that verifies, at the next :meth:`fit`; None where there is none.

        Args:
            judge: As for ``CheckpointManager.resume``.

        Raises:
            StateError: There are no checkpoints to look for, or they are of another run.
        """
        if self.manager is None:
            raise StateError("this Trainer keeps no checkpoints; give it checkpoints=")
        return self.manager.resume(judge)

    def state_dict(self) -> TrainerState:
        """Return what the trainer itself knows: past epochs, and the sums of the present one."""
        return {"history": self.history, "sums": list(self._sums)}

    def load_state_dict(self, state: TrainerState) -> None:
        """Take it back."""
        total, examples = state["sums"]
        self.history, self._sums = list(state["history"]), (torch.as_tensor(total), int(examples))

    def stop(self) -> None:
        """Let ``fit`` come back after the present step, with a checkpoint; for signal handlers and threads.

        Growth is not finished then: ``resume`` in another process goes on with it.
        """
        self._asked_to_stop = True

    def fit(self) -> nn.Module:
        """Train for all epochs and return the model: the same object, wider.

        Raises:
            FinishedError: This trainer has run already, or was closed.
            ConfigError: ``train`` gave no batch.
        """
        if self._done:
            raise FinishedError(
                "this Trainer has run, or was closed; make a new one to train the model further"
            )
        self._done = True
        done = 0 if self.batches is None else self.batches.epoch
        for epoch in range(done + 1, self.epochs + 1):
            mean = self._train_epoch(epoch)
            if mean is None:
                return self._left_early()
            row = {"epoch": epoch, "train_loss": mean}
            if self.val is not None:
                row |= self.evaluate(self.val)
            if self.scheduler_interval == "epoch" and isinstance(self.scheduler, ReduceLROnPlateau):
                self.scheduler.step(row.get("loss", row["train_loss"]))
            elif self.scheduler_interval == "epoch" and self.scheduler is not None:
                self.scheduler.step()
            self.history.append(row)
            self.growth.rewrap()
            self.growth.epoch({name: value for name, value in row.items() if name != "epoch"})
            self._keep_best(row)
        if self.manager is not None:
            last = self.history[-1] if self.history else {}
            self.manager.save_last({name: value for name, value in last.items() if name != "epoch"})
            self.manager.close()
        return self.growth.finish()

    def _keep_best(self, row: Mapping[str, float]) -> None:
        """Take a checkpoint after the epoch that measured best so far; the first process's numbers tell."""
        if self.manager is None or self.best is None or self.best[0] not in row or self.best[0] in SAVED:
            return
        name, sense = self.best
        known = [past[name] for past in self.history if math.isfinite(past.get(name, math.nan))]
        is_best = row[name] in known and row[name] == (min if sense == "min" else max)(known)
        if self.growth.peers.broadcast_floats([is_best])[0]:
            numbers = {key: value for key, value in row.items() if key != "epoch"}
            self.manager.save_or_tell(numbers, wait=True)  # a newer snapshot would take the best one's place

    def close(self) -> None:
        """Let go of the run folder, the checkpoints and what is in the model, wherever training is.

        After :meth:`fit` nothing is left to do. Before its end the model stays as it is by then, and a new
        Trainer can go on from the last checkpoint with ``resume``.
        """
        self._done = True  # fit would take a step of the optimizer before it found out
        if self.manager is not None:
            self.manager.close()
        if not self.growth.finished:
            put_down(self.growth)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _left_early(self) -> nn.Module:
        """End in the middle of a run."""
        self.stopped = True
        if self.manager is not None:
            self.manager.save_last()
            self.manager.close()
        return self.model

    def _to_stop(self) -> bool:
        """Tell whether somebody has asked; several processes stop at the same step."""
        peers = self.growth.peers
        if peers.world == 1:
            return self._asked_to_stop
        return self.growth.steps % ASKED == 0 and any(
            asked for (asked,) in peers.all_gather_ints([int(self._asked_to_stop)])
        )

    def evaluate(self, batches: Iterable[object]) -> dict[str, float]:
        """Average the loss and every metric over the examples of ``batches``, in eval mode."""
        self.model.eval()
        model = self.growth.wrapping.host  # each process by itself: nothing waits for the others
        totals, examples = dict.fromkeys(self.metrics, 0.0), 0
        with torch.no_grad():
            for batch in batches:
                count = self._examples(batch)
                examples += count
                for name, metric in self.metrics.items():
                    totals[name] += count * float(metric(model, batch))
        if not examples:
            raise ConfigError("the batches to evaluate are empty; pass some that can be iterated again")
        return {name: total / examples for name, total in totals.items()}

    def _train_epoch(self, epoch: int) -> float | None:
        """Return the mean loss; None where the run is to stop before the epoch's end."""
        self.model.train()
        sampler = getattr(self.train, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(epoch)  # without it every epoch has the first one's order
        for batch in self.train if self.batches is None else self.batches:
            loss = self.loss_fn(self.model, batch)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
            if self.scheduler is not None and self.scheduler_interval == "step":
                self.scheduler.step()
            self.growth.step(batch, loss)
            total, examples = self._sums
            count = self._examples(batch)
            self._sums = total.to(loss.device) + count * loss.detach(), examples + count  # no sync per step
            if self.manager is not None:
                self.manager.step({"train_loss": loss})
            if self._to_stop():
                return None
        (total, examples), self._sums = self._sums, (torch.zeros(()), 0)
        if not examples:
            raise ConfigError(
                "train gave no batch; pass batches that can be iterated again, like a DataLoader"
            )
        mean = total.detach().double().cpu() / examples
        self.growth.peers.all_reduce_mean([mean])
        return float(mean)

    def _examples(self, batch: object) -> int:
        """Count the examples of a batch as growth does, 1 where no tensor tells."""
        try:
            return count_examples(self.growth.run.parts.axes.inward(batch))
        except ProbeError:
            return 1
