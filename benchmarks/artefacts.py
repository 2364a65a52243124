"""One of every kind of thing Esper keeps, small, with a way to put other bytes in the place of its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import esper
from benchmarks.hostile import REQUEST
from esper.checkpoint import (
    Batches,
    BlobStorage,
    CheckpointManager,
    FolderStorage,
    MemoryStorage,
    Run,
    Storage,
)
from esper.checkpoint.format.manifest import MANIFEST, PARTS
from esper.checkpoint.format.reader import newest, read
from esper.errors import EsperError, KernelError
from esper.saving import rebuild_template
from esper.saving.save import load_into
from esper.tezzeret.build import build
from esper.tezzeret.container import open_sealed, seal
from esper.tezzeret.signing import load_key
from esper.urza.blobs.memory import MemoryStore
from esper.urza.folder import FolderStore

CLASSES, EPOCHS, BATCH = 8, 10, 32
STEPS = (60, 120)  # of the checkpoints; between them the model grows
FILES = (*PARTS, MANIFEST)
Parts = Mapping[str, bytes]


@dataclass(frozen=True)
class Artefact:
    """One thing that is kept.

    Attributes:
        name: For tables.
        parts: Its sound bytes.
        others: Sound things of its kind: of another step, of another run.
        strangers: Those of them that are not sound under this one's name.
        place: Puts bytes, or nothing, in the place of a part.
        accepted: None where it is refused as it must be; otherwise what happened.
    """

    name: str
    parts: Parts
    others: Sequence[Parts]
    strangers: Sequence[Parts]
    place: Callable[[str, bytes | None], None]
    accepted: Callable[[], str | None]


@dataclass
class Grown:
    """A run that grew."""

    checkpoints: MemoryStorage
    states: MemoryStorage  # the same, read by name and not as the newest that is sound
    folder: Path  # the saved model


def artefacts(folder: Path) -> list[Artefact]:
    """Make one of every kind, and what is needed to mix them up, in a folder."""
    runs = [grown(folder / f"run{seed}", seed) for seed in range(2)]
    storages = [FolderStorage(folder / "checkpoints"), BlobStorage(MemoryStore()), MemoryStorage()]
    made = [
        checkpoint("checkpoint in a folder", storages[0], runs, "checkpoints"),
        checkpoint("checkpoint in a store of blobs", storages[1], runs, "checkpoints"),
        checkpoint("state in memory", storages[2], runs, "states"),
    ]
    made += [saved_model(runs, alone) for alone in (False, True)]
    return [*made, kernel(folder / "kernels", folder / "kernel.key")]


def host() -> nn.Sequential:
    return nn.Sequential(nn.Linear(CLASSES, 1), nn.Tanh(), nn.Linear(1, CLASSES))


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def grown(folder: Path, seed: int) -> Grown:
    """Train a model while it grows, and keep it twice on the way and once at the end."""
    torch.manual_seed(seed)
    net = host()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    labels = torch.arange(640) % CLASSES
    noisy = 2 * torch.eye(CLASSES)[labels] + 0.3 * torch.randn(640, CLASSES)
    data = torch.utils.data.TensorDataset(noisy, labels)
    batches = Batches(torch.utils.data.DataLoader(data, BATCH, shuffle=True))
    probe = [(2 * torch.eye(CLASSES).repeat(16, 1), torch.arange(CLASSES).repeat(16))]
    growth = esper.grow(
        net,
        optimizer,
        loss_fn,
        probe=probe,
        steps=EPOCHS * 20,
        budget={"growth_factor": 8.0},
        growth="incubate",
        seed=seed,
    )
    kept = Grown(MemoryStorage(), MemoryStorage(), folder)
    run = Run(net, optimizer, growth=growth, batches=batches)
    with CheckpointManager(kept.checkpoints, run, every=10**9) as manager:
        while batches.epoch < EPOCHS:
            for batch in batches:
                loss = loss_fn(net, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                growth.step(batch, loss)
                if manager.steps in STEPS:
                    name = manager.save(wait=True)
                    parts = whole(kept.checkpoints, name)
                    kept.states.put(name, {part: [content] for part, content in parts.items()})
    growth.finish()
    growth.save(folder)
    return kept


def whole(storage: MemoryStorage, name: str) -> Parts:
    return {part: storage.get(name, part) for part in FILES}


def checkpoint(label: str, storage: Storage, runs: Sequence[Grown], kind: str) -> Artefact:
    """Keep two checkpoints of the first run; the newer one is the artefact."""
    kept: list[MemoryStorage] = [getattr(run, kind) for run in runs]
    older, newer = kept[0].names()
    for name in (older, newer):
        storage.put(name, {part: [content] for part, content in whole(kept[0], name).items()})
    other = [whole(kept[0], older), whole(kept[1], newer), whole(kept[1], older)]
    parts = dict(whole(kept[0], newer))
    keys = {part: part for part in FILES}
    if isinstance(storage, BlobStorage):
        commits = {name: storage.blobs.get(f"{name}/commit") or b"" for name in (older, newer)}
        keys = {part: f"{commits[newer].decode().strip()}/{part}" for part in FILES} | {"commit": "commit"}
        parts["commit"] = commits[newer]
        other = [{**one, "commit": commits[older]} for one in other]

    def place(part: str, content: bytes | None) -> None:
        if isinstance(storage, FolderStorage):
            place_file(storage.folder / newer / part, content)
        elif isinstance(storage, BlobStorage):
            key = f"{newer}/{keys[part]}"
            storage.blobs.delete(key) if content is None else storage.blobs.put(key, [content])
        elif isinstance(storage, MemoryStorage):
            held = storage.kept[newer]
            held.pop(part, None) if content is None else held.update({part: content})

    def found() -> str | None:
        told: list[str] = []
        got = newest(storage, told.append)
        said = len(told) == 1 and newer in told[0]
        # Among blobs, one without its commit does not exist: it cannot be told from one never finished.
        if got is not None and got.manifest.name == older and (said or newer not in storage.names()):
            return None
        return f"{'nothing' if got is None else got.manifest.name} was found"

    def refused() -> str | None:
        read(storage, newer)
        return "it was read"

    # A whole checkpoint of this step from another run is a sound one: where it came from nothing can tell.
    return Artefact(
        label, parts, other, [other[0], other[2]], place, judged(found if kind == "checkpoints" else refused)
    )


def place_file(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink()
        return
    path.touch(mode=0o600)
    path.write_bytes(content)


def judged(load: Callable[[], str | None], refusals: tuple[type[Exception], ...] = (EsperError,)) -> Any:
    """Say None where loading was refused in the way it must be, and what happened where it was not."""

    def judge() -> str | None:
        try:
            return load()
        except refusals:
            return None
        except Exception as error:
            return f"it raised {error!r}"

    return judge


def saved_model(runs: Sequence[Grown], alone: bool) -> Artefact:
    """Take the first run's folder; ``alone``: loaded by torch alone, as the rebuild.py in it does."""
    folder = runs[0].folder
    found = [{path.name: path.read_bytes() for path in run.folder.iterdir()} for run in runs]

    def load() -> str | None:
        model = host()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        try:
            (rebuild_template.load if alone else load_into)(model, folder)
        except (EsperError, ValueError, OSError):
            after = model.state_dict()
            if not all(torch.equal(tensor, after[name]) for name, tensor in before.items()):
                return "it was refused, and the model was changed"
            raise
        return "it was loaded"

    refusals = (ValueError, OSError) if alone else (EsperError,)
    label = f"saved model, {'torch alone' if alone else 'esper.load_into'}"
    place: Callable[[str, bytes | None], None] = lambda part, content: place_file(folder / part, content)  # noqa: E731
    return Artefact(label, found[0], found[1:], [], place, judged(load, refusals))


def kernel(folder: Path, key_file: Path) -> Artefact:
    """Seal two kernels; the first one and the key are the artefact."""
    store, key = FolderStore(folder), load_key(key_file, create=True)
    built = [build(REQUEST), build(replace(REQUEST, seed=1))]
    sealed = [seal(one, key) for one in built]
    for one, container in zip(built, sealed, strict=True):
        store.put(one.id, container)
    name = built[0].id
    paths = {"container": folder / name[:2] / f"{name}.kernel", "key": key_file}

    def load() -> str | None:
        container = store.get(name)
        if container is None:
            raise KernelError(f"no kernel {name}")
        open_sealed(container, load_key(key_file), name)
        return "it was opened"

    stranger = {"container": sealed[1]}
    other = {**stranger, "key": load_key(key_file.with_name("other.key"), create=True)}
    place: Callable[[str, bytes | None], None] = lambda part, content: place_file(paths[part], content)  # noqa: E731
    return Artefact(
        "kernel's container", {"container": sealed[0], "key": key}, [other], [stranger], place, judged(load)
    )
