"""Saves a grown model as a folder that loads with Esper or, through its own ``rebuild.py``, with torch alone.

model.safetensors   the weights
genome.json         shapes of the model before it grew, and everything that grew since
card.md             what grew where, for people
rebuild.py          loads the folder where Esper is not installed
SHA256SUMS          digests of the four, checked before any is parsed; `sha256sum -c SHA256SUMS` does so too
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from esper.blueprints.kernel import GraphKernel
from esper.contracts import DeepenPlan, WidenPlan
from esper.errors import SavedModelError, StateError, SurgeryError
from esper.files import read_regular
from esper.kasmina.depth.deepen import duplicate, insert
from esper.printable import quoted, shortened
from esper.saving import genome, rebuild_template
from esper.storage.replacing import mend, publish, reason, standing, write_file
from esper.surgery.adding import Passing
from esper.surgery.branches import attach
from esper.surgery.isolation.acting import own_state
from esper.surgery.widen_layers import empty_slices, widen

GENOME, TENSORS, SUMS = "genome.json", "model.safetensors", "SHA256SUMS"
LISTED = ("card.md", GENOME, TENSORS, "rebuild.py")  # in SUMS, in this order
LISTED_ONCE = (GENOME, TENSORS)  # by the saves of esper 0.1.0
FILES = frozenset({*LISTED, SUMS})
MOST_TEXT = 64 << 20  # bytes of any file but the weights
MOST = {TENSORS: 1 << 42}
Model = TypeVar("Model", bound=nn.Module)


def save(
    model: nn.Module,
    plans: Sequence[genome.Plan],
    directory: str | Path,
    *,
    card: Mapping[str, object],
    tensors: Mapping[str, object] | None = None,
) -> Path:
    """Write a grown model to a folder, all of it or nothing.

    Args:
        model: The grown model.
        plans: Everything that grew since the plain model, in order.
        directory: Created, or replaced if it holds an earlier save and nothing else.
        card: Facts for ``card.md``, by name.
        tensors: The state that the plans lead to, where it is not the model's own.

    Returns:
        The folder.

    Raises:
        StateError: The plans do not lead to this model, its state is not all plain tensors, or the folder
            cannot be written or holds something else.
    """
    if not isinstance(directory, str | Path) or not str(directory):
        raise StateError(f"directory={quoted(directory)} is no path; give the folder to write")
    state = own_state(model) if tensors is None else tensors
    files = {
        GENOME: genome.encode(model, plans, genome.shapes_in(state)),
        TENSORS: safetensors.torch.save(_portable(state)),
    }
    files["card.md"] = _card(model, plans, card).encode()
    target = Path(os.path.abspath(directory))  # "." has no name to put hidden ones beside

    def write(draft: Path) -> None:
        for name, content in files.items():
            write_file(draft / name, [content])

    try:
        files["rebuild.py"] = Path(rebuild_template.__file__).read_bytes()
        files[SUMS] = sums({name: _digest(content) for name, content in files.items()})
        _refuse_others(target)
        publish(target, write)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL in it
        if isinstance(error, StateError):
            raise
        raise StateError(f"cannot save to {target}: {reason(error)}; nothing was changed there") from error
    return Path(directory)


def load_into(model: Model, directory: str | Path) -> Model:
    """Grow a plain model as a saved one grew, and load its weights.

    Args:
        model: Built as the saved one was before it grew; changed in place, parameters keep their identity.
        directory: Written by ``save``.

    Returns:
        ``model`` itself.

    Raises:
        SavedModelError: The folder is missing, damaged, of an unknown format or grown from another model;
            ``model`` is as it was.
    """
    if not isinstance(model, nn.Module):
        raise SavedModelError(f"a {type(model).__name__} cannot be loaded into; build the nn.Module anew")
    if not isinstance(directory, str | Path):
        raise SavedModelError(f"directory={quoted(directory)} is no path; growth.save(...) returns one")
    folder, kind = Path(directory), type(model).__name__
    held = model.state_dict().items()
    if empty := [name for name, one in held if isinstance(one, Tensor) and one.is_meta]:
        raise SavedModelError(
            f"{empty[0]!r} of this {kind} is on the meta device, where nothing can be loaded; call "
            "model.to_empty(device=...) first"
        )
    recipe, tensors = _last_complete(Path(os.path.abspath(directory)), folder)
    shapes, plans = genome.decode(recipe)
    needed = f"{folder} needs the model as it was before it grew, and this {kind} is not"
    genome.require_fit(shapes, genome.shapes_of(model), needed)
    try:
        names, weights = genome.aliases(model), genome.settled(safetensors.torch.load(tensors), plans)
    except SafetensorError as error:
        raise SavedModelError(
            f"{folder / TENSORS} is not in the safetensors format: {shortened(str(error), 300)}"
        ) from error
    for plan in plans:
        genome.resize(shapes, plan, names, grow=True)
    genome.require_fit(
        shapes, {name: list(t.shape) for name, t in weights.items()}, f"{folder} contradicts itself"
    )
    with ExitStack() as undo:
        for plan in plans:
            try:
                undo.callback(_repeat(model, plan))
            except (SurgeryError, AttributeError, TypeError, ValueError, RuntimeError) as error:
                raise SavedModelError(f"{folder} does not fit this {kind}: {error}") from error
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise SavedModelError(f"{folder} does not fit this {kind}: {error}") from error
        undo.pop_all()
    return model


def _repeat(model: nn.Module, plan: genome.Plan) -> Callable[[], None]:
    """Carry one plan out with empty tensors; returns the way back."""
    if isinstance(plan, WidenPlan):
        return widen(model, plan, empty_slices(model, plan)).undo
    if isinstance(plan, DeepenPlan):
        return insert(model, plan, duplicate(model, plan.donor)).undo
    ends = model.get_submodule(plan.entry), model.get_submodule(plan.exit)
    kernel = GraphKernel(genome.program_of(plan), next(model.parameters()))
    return attach(plan.name, kernel, ends, plan.signature.port, Passing(plan.reads, plan.writes))


def _portable(state: Mapping[str, object]) -> dict[str, Tensor]:
    tensors = {}
    for name, value in state.items():
        unfit = _unfit(value)
        if unfit is not None or not isinstance(value, Tensor):
            raise StateError(
                f"cannot save {name!r}, a {unfit}: a folder holds dense tensors of ordinary types"
            )
        tensors[name] = (
            value.detach().cpu().clone(memory_format=torch.contiguous_format)
        )  # tied ones: each its own
    return tensors


def _unfit(value: object) -> str | None:
    """Say what a value is that no folder can hold; None: it can."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.layout is not torch.strided:
        return f"{value.layout} tensor; to_dense() makes it one that can be saved"
    if value.is_meta:
        return "tensor on the meta device, which has no values"
    return None if value.dtype in rebuild_template.DTYPES.values() else str(value.dtype)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sums(digests: Mapping[str, str]) -> bytes:
    """Write digests as ``sha256sum`` does, in the one form that is accepted back."""
    return "".join(f"{digests[name]}  {name}\n" for name in LISTED if name in digests).encode()


def _read(folder: Path) -> tuple[bytes, bytes]:
    """Read genome and tensors, and return them only if every file of the folder has its recorded digest."""
    given = _contents(folder, [SUMS])[0]
    lines = given.splitlines()
    names = LISTED_ONCE if not any(line.endswith((b"card.md", b"rebuild.py")) for line in lines) else LISTED
    found = dict(zip(names, _contents(folder, names), strict=True))
    for name, content in found.items():
        if sums({name: _digest(content)}).rstrip() not in lines:
            raise SavedModelError(
                f"{folder / name} is damaged: its SHA-256 is not in {SUMS}; fetch the folder again, or if you"
                f" changed it: sha256sum {' '.join(LISTED)} > {SUMS}"
            )
    if given != sums({name: _digest(content) for name, content in found.items()}):
        raise SavedModelError(f"{folder / SUMS} is damaged; fetch the folder again")
    return found[GENOME], found[TENSORS]


def _last_complete(target: Path, asked: Path) -> tuple[bytes, bytes]:
    """Read what stands under the name, or was to, where a writer was killed or is between two renames."""
    with suppress(OSError, ValueError):  # a folder that may only be read is read as it is
        mend(target)
    for _ in range(9):
        place = standing(target)
        if place == target:
            return _read(asked)
        with suppress(SavedModelError):  # it was given its name while it was read
            return _read(place)
    return _read(asked)


def _contents(folder: Path, names: Sequence[str]) -> list[bytes]:
    if missing := [name for name in names if not os.path.isfile(folder / name)]:
        raise SavedModelError(
            f"{folder} is not a saved model: no {', '.join(missing)}; growth.save(...) writes one"
        )
    return [
        read_regular(folder / name, limit=MOST.get(name, MOST_TEXT), what="the saved", error=SavedModelError)
        for name in names
    ]


def _refuse_others(target: Path) -> None:
    """Let nothing be replaced but an earlier save, all of which are plain files of ours, or an empty folder.

    Raises:
        StateError: Something else is there.
    """
    try:
        kind = os.lstat(target).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(kind):
        raise StateError(f"{target} is a link; give the folder it leads to, {os.path.realpath(target)}")
    if not stat.S_ISDIR(kind):
        raise StateError(f"{target} exists and is no folder; choose another one")
    with os.scandir(target) as entries:
        found = {entry.name: entry.is_file(follow_symlinks=False) for entry in entries}
    if found and not (found.keys() <= FILES and all(found.values()) and GENOME in found):
        raise StateError(f"{target} exists and is not just an earlier save; choose another folder")


def _card(model: nn.Module, plans: Iterable[genome.Plan], facts: Mapping[str, object]) -> str:
    count = sum(parameter.numel() for parameter in model.parameters())
    lines = ["# A grown model", "", "| | |", "|---|---|"]
    for name, value in {"model": type(model).__name__, "parameters": count, **facts}.items():
        lines.append(f"| {name} | {f'{value:.6g}' if isinstance(value, float) else value} |")
    lines += ["", "## What grew", "", "| site | units | tensors |", "|---|---|---|"]
    for plan in plans:
        if isinstance(plan, DeepenPlan):
            lines.append(f"| {plan.site} | +1 | new block {plan.container}.{plan.name} |")
            continue
        if not isinstance(plan, WidenPlan):
            lines.append(f"| {plan.site} | {plan.hidden} | new branch {plan.name} |")
            continue
        tensors = ", ".join(f"{edit.name} {edit.old} → {edit.new}" for edit in plan.edits)
        lines.append(f"| {plan.site} | +{plan.units} | {tensors} |")
    lines += ["", "## Load it", "", "With Esper: `esper.load_into(Net(), folder)`.", ""]
    lines += [
        "With torch alone, from inside this folder: `from rebuild import load; model = load(Net())`.",
        "",
    ]
    return "\n".join(lines)
