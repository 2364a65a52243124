"""A checkpoint's model as a saved model's folder; no class of the user's is needed for that."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from esper.checkpoint.contents.run_shards import gathered
from esper.checkpoint.format.manifest import digest, safetensors_chunks
from esper.checkpoint.format.reader import Checkpoint
from esper.checkpoint.format.run_state import RunState
from esper.contracts import DeepenPlan, WidenPlan
from esper.errors import StateError
from esper.saving import rebuild_template
from esper.saving import save as saving
from esper.saving.genome import decode
from esper.storage.protocol import Chunks, Storage
from esper.storage.replacing import publish, reason, write_file


def export_model(checkpoint: Checkpoint, directory: str | Path, storage: Storage) -> Path:
    """Write what ``growth.save`` would have written at that step.

    Args:
        checkpoint: Checkpoint, read; kernels of seeds that were awake are no part of the model yet and are
            left out.
        storage: Storage in which it lies, and the shards of a sharded model with it.
        directory: Path of the folder to create.

    Raises:
        StateError: The model's state is not all plain tensors, or the folder exists or cannot be written.
    """
    target = Path(os.path.abspath(directory))
    tensors = safetensors_chunks(weights_of(checkpoint.state, storage))
    files: dict[str, Chunks] = {saving.GENOME: [checkpoint.genome], saving.TENSORS: tensors}
    files["card.md"] = [card(checkpoint).encode()]

    def write(draft: Path) -> None:
        for name, chunks in files.items():
            write_file(draft / name, chunks)

    try:
        files["rebuild.py"] = [Path(rebuild_template.__file__).read_bytes()]
        files[saving.SUMS] = [saving.sums({name: digest(chunks) for name, chunks in files.items()})]
        if os.path.lexists(target):
            raise StateError(f"{target} exists; choose another folder")
        publish(target, write)
    except OSError as error:
        raise StateError(f"cannot export to {target}: {reason(error)}") from error
    return Path(directory)


def weights_of(state: RunState, storage: Storage) -> dict[str, Tensor]:
    """Return the model's tensors, whole.

    Raises:
        StateError: The model's state is not all plain tensors.
    """
    weights = gathered(storage, state) if "table" in state else state["modules"][""]["state"]
    tensors: dict[str, Tensor] = {}
    for name, value in weights.items():
        if not isinstance(value, Tensor) or value.dtype not in rebuild_template.DTYPES.values():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise StateError(
                f"cannot export {name!r}, a {kind}: a saved model holds tensors of ordinary types"
            )
        tensors[name] = value
    return tensors


def card(checkpoint: Checkpoint) -> str:
    """Say for people what the folder holds."""
    manifest = checkpoint.manifest
    facts = {name: manifest.summary.get(name) for name in ("model", "parameters")}
    facts |= {"steps": manifest.step, "checkpoint": manifest.name, **manifest.metrics}
    lines = ["# A growing model, as a checkpoint held it", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {f'{v:.6g}' if isinstance(v, float) else v} |" for name, v in facts.items()]
    lines += ["", "## What grew", "", "| site | units |", "|---|---|"]
    for plan in decode(checkpoint.genome)[1]:
        if isinstance(plan, WidenPlan):
            grown = f"+{plan.units}"
        else:
            grown = f"new {'block' if isinstance(plan, DeepenPlan) else 'branch'} {plan.name}"
        lines.append(f"| {plan.site} | {grown} |")
    lines += ["", "Load it: `esper.load_into(Net(), folder)`, or with torch alone, from inside this folder:"]
    return "\n".join([*lines, "`from rebuild import load; model = load(Net())`.", ""])
