"""The format of a checkpoint: a manifest with a digest of every part, and the parts.

genome.json           what grew, and the seeds that are awake; for people and tools, so it is not compressed
state.json.zlib       the nested state, as ``encoding.py`` writes it; tensors by name
tensors.safetensors   the tensors
manifest.json         versions, step, metrics, and size and SHA-256 of every part; written last

Nothing is parsed before its digest holds. Digests find damage; they do not stop whoever can write the folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from esper.checkpoint.format.checking import require_facts, require_genome, require_state
from esper.checkpoint.format.encoding import DTYPES, Packing, Unpacking
from esper.checkpoint.format.run_state import RunState, ShardFacts
from esper.errors import CheckpointError, StateError
from esper.saving.genome_form import count
from esper.storage.protocol import Chunks, Storage, part_of

FORMAT = 1
MANIFEST, GENOME, STATE, TENSORS = "manifest.json", "genome.json", "state.json.zlib", "tensors.safetensors"
PARTS = (GENOME, STATE, TENSORS)
MAX_MANIFEST = 1 << 24  # bytes; with a thousand shards it has 200 kB
MAX_STATE = 1 << 28  # bytes of JSON; a growing run of 10 M parameters has 200 kB
INFLATED = 1 << 20, 32  # bytes of JSON that a small part may become, and times its size a large one; usual: 3
MAX_VALUES = 1 << 24  # of a state's JSON; a container takes 100 bytes of memory
_NAME = re.compile(r"step-(\d{8,})")
_SHA = re.compile(r"[0-9a-f]{64}")
_FIELDS = {"format", "step", "time", "code", "metrics", "summary", "parts", "digest"}


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int  # optimizer steps done
    time: float  # seconds since the epoch
    code: Mapping[str, str]  # versions of esper, torch, numpy and Python that wrote it
    metrics: Mapping[str, float | None]
    summary: Mapping[str, Any]  # JSON, for tables: parameters, seeds that are awake, position in the data
    parts: Mapping[str, ShardFacts] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the checkpoint."""
        return name_of(self.step)

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return sum(part["size"] for part in self.parts.values())


def name_of(step: int) -> str:
    """Return the name of a step's checkpoint; names sort as steps do."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Return the step of a checkpoint's name, None if it is not one."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match and name_of(int(match[1])) == name else None


def parts_of(
    manifest: Manifest, genome: bytes, skeleton: object, tensors: Mapping[str, Tensor]
) -> dict[str, Chunks]:
    """Write a checkpoint's parts, the manifest last."""
    text = json.dumps(skeleton, separators=(",", ":"), allow_nan=False).encode()
    parts: dict[str, Chunks] = {
        GENOME: [genome],
        STATE: [zlib.compress(text, 1)],  # JSON shrinks 5 to 10 times; weights by 8 %, which does not pay
        TENSORS: safetensors_chunks(tensors),
    }
    table = {
        name: {"size": sum(len(c) for c in chunks), "sha256": digest(chunks)}
        for name, chunks in parts.items()
    }
    facts = {"format": FORMAT, **asdict(manifest), "parts": table}
    parts[MANIFEST] = [canonical({**facts, "digest": digest([canonical(facts)])})]
    return parts


def digest(chunks: Chunks) -> str:
    """Return the SHA-256 of chunks, end to end."""
    sha = hashlib.sha256()
    for chunk in chunks:
        sha.update(chunk)
    return sha.hexdigest()


def canonical(facts: object) -> bytes:
    """Write JSON in the one form that is accepted back, so that a flipped space is found too."""
    return json.dumps(facts, sort_keys=True, indent=1, allow_nan=False).encode()


def safetensors_chunks(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """Write a safetensors file around tensors as they lie in memory; safetensors itself would copy them.

    Args:
        tensors: Contiguous tensors on the CPU, by name.
    """
    # Wide types first keeps every tensor aligned, as the library does.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, object] = {}
    position = 0
    for name in names:
        tensor = tensors[name]
        end = position + tensor.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [
        len(text).to_bytes(8, "little") + text,
        *(raw(tensors[name]) for name in names if tensors[name].nbytes),
    ]


def raw(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor without copying them."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def read_manifest(storage: Storage, name: str) -> Manifest:
    """Read and check a manifest.

    Raises:
        CheckpointError: It is missing, damaged or of another checkpoint.
        StateError: It is whole, and of a version to come.
    """
    content = part_of(storage, name, MANIFEST, most=MAX_MANIFEST)
    try:
        facts = json.loads(content)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{name}: {MANIFEST} is damaged: it is not JSON") from None
    if not isinstance(facts, dict):
        raise CheckpointError(f"{name}: {MANIFEST} is damaged: it is not an object")
    claimed = facts.pop("digest", None)
    try:
        whole = claimed == digest([canonical(facts)]) and canonical({**facts, "digest": claimed}) == content
    except (ValueError, RecursionError):  # NaN, which we never write
        whole = False
    if not whole:
        raise CheckpointError(f"{name}: {MANIFEST} is damaged: its SHA-256 digest is another")
    if (
        type(facts.get("format")) is not int or facts["format"] != FORMAT
    ):  # not damage: every version seals its manifest in this way
        raise StateError(
            f"{name} has format version {facts.get('format')!r:.20}, this Esper reads version {FORMAT}: "
            "update esper-morph, or move that checkpoint away"
        )
    parts = facts.get("parts")
    if facts.keys() | {"digest"} != _FIELDS or not isinstance(parts, dict):
        raise CheckpointError(f"{name}: {MANIFEST} has other fields than this format")
    if list(parts) != sorted(PARTS) or not all(map(_is_part, parts.values())):
        raise CheckpointError(f"{name}: {MANIFEST} lists other parts than {', '.join(PARTS)}")
    require_facts(facts, name)
    if name_of(facts["step"]) != name:
        raise CheckpointError(f"{name} holds the checkpoint of step {facts['step']}: it was moved or swapped")
    del facts["format"]
    return Manifest(**facts)


def _is_part(part: object) -> bool:
    return (
        isinstance(part, dict)
        and part.keys() == {"size", "sha256"}
        and count(part["size"])
        and isinstance(part["sha256"], str)
        and bool(_SHA.fullmatch(part["sha256"]))
    )


def damage(storage: Storage, name: str) -> Iterator[tuple[str, str]]:
    """Name every part that is not what the manifest says, with the reason; one is in memory at a time."""
    try:
        manifest = read_manifest(storage, name)
    except StateError as error:
        yield MANIFEST, str(error)
        return
    for part in PARTS:
        try:
            read_part(storage, manifest, part)
        except CheckpointError as error:
            yield part, str(error)
    for shard in manifest.summary.get(
        "shards", []
    ):  # of a sharded model: beside the checkpoint, listed by it
        try:
            content = part_of(storage, shard["name"], TENSORS, most=shard["size"])
            if len(content) != shard["size"] or digest([content]) != shard["sha256"]:
                yield shard["name"], f"{shard['name']} is damaged: its size or SHA-256 digest is another"
        except CheckpointError as error:
            yield shard["name"], str(error)


def read_part(storage: Storage, manifest: Manifest, part: str) -> bytes:
    """Read one part.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    facts = manifest.parts[part]
    content = part_of(storage, manifest.name, part, most=facts["size"])
    if len(content) != facts["size"]:
        raise CheckpointError(
            f"{manifest.name}: {part} is damaged: it has {len(content)} bytes, "
            f"the manifest says {facts['size']}"
        )
    if digest([content]) != facts["sha256"]:
        raise CheckpointError(f"{manifest.name}: {part} is damaged: its SHA-256 digest is another")
    return content


def decode_state(manifest: Manifest, parts: Mapping[str, bytes]) -> RunState:
    """Return the state of checked parts.

    Raises:
        CheckpointError: It is not in this format.
    """
    text = inflated(parts[STATE], manifest.name)
    try:
        skeleton, tensors = json.loads(text), safetensors.torch.load(parts[TENSORS])
    except (ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{manifest.name} is not in the format it claims: {error!s:.200}") from error
    state = require_state(Unpacking(tensors).unpack(skeleton), manifest.step, manifest.name)
    require_genome(parts[GENOME], state, manifest.name)
    return state


def inflated(content: bytes, name: str) -> bytes:
    """Return the JSON of a state, of which a few bytes cannot make more than memory should hold.

    Raises:
        CheckpointError: It would, or is not compressed as we do.
    """
    least, times = INFLATED
    most = min(max(least, times * len(content)), MAX_STATE)
    try:
        inflate = zlib.decompressobj()
        text = inflate.decompress(content, most)
    except zlib.error as error:
        raise CheckpointError(f"{name} is not in the format it claims: {error}") from error
    if not inflate.eof or inflate.unused_data:
        raise CheckpointError(
            f"{name}: {STATE} is cut short, becomes over {most} bytes, or something follows it"
        )
    if text.count(b",") + text.count(b"[") + text.count(b"{") > MAX_VALUES:
        raise CheckpointError(f"{name}: {STATE} holds over {MAX_VALUES} values")
    return text


def numbers(metrics: object) -> tuple[dict[str, float | None], list[str]]:
    """Return metrics as JSON numbers, None for what is not finite or no number; the latter in words too."""
    if not isinstance(metrics, Mapping):
        return {}, [f"metrics are {metrics!r:.80}, no mapping of names to numbers; the checkpoint has none"]
    found: dict[str, float | None] = {}
    strange = []
    for key, value in metrics.items():
        name = str(key)
        try:
            number = float(value.detach() if isinstance(value, Tensor) else value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            strange.append(
                f"the metric {name[:80]!r} is {value!r:.80}, no number: the checkpoint does not know it"
            )
            number = math.nan
        found[name] = number if math.isfinite(number) else None
    return found, strange


def packed(state: object, spare: Mapping[str, Tensor] | None = None) -> tuple[object, dict[str, Tensor]]:
    """Copy a state out of a run: JSON values, and tensors by name; ``spare`` ones are written over."""
    packing = Packing(spare)
    return packing.pack(state), packing.tensors
