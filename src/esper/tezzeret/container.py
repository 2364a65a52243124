"""The container a kernel is kept in; nothing in it is parsed before its digest and its signature hold.

    magic 8 · version 2 · zero 2 · length of manifest 4 · length of parts 8 · SHA-256 32 · HMAC-SHA256 32
    manifest (canonical JSON) · weights.safetensors · variant:<pipeline> …

The digest is of manifest and parts, the signature of everything but itself. A version has one digest and one
signature algorithm; no field names them, so none can be swapped.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import struct
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from esper.contracts import Kernel, Signature, kernel_id
from esper.errors import KernelError
from esper.tezzeret.contents import canonical, check_archive, parse_object, tensor_table, whole_numbers
from esper.tezzeret.signing import sign

MAGIC = b"\x89ESPERK\n"  # not text, and a transfer that rewrites line ends breaks it
VERSION = 1
WEIGHTS = "weights.safetensors"
NATIVE = "variant:aoti"  # the only part that may hold machine code
MAX_MANIFEST = 4 << 20
MAX_PARTS_BYTES = 512 << 20
_HEADER = struct.Struct(">8sHHIQ")
_SHA = hashlib.sha256().digest_size
_SEAL = _HEADER.size + 2 * _SHA  # where the manifest starts

_PIPELINE = re.compile(r"[a-z][a-z0-9_]{0,31}")
_PART = re.compile(r"weights\.safetensors|variant:[a-z][a-z0-9_]{0,31}")
_MANIFEST: dict[str, type] = {
    "graph": str,
    "hidden": int,
    "id": str,
    "parts": list,
    "pipeline": str,
    "published": bool,
    "report": dict,
    "seed": int,
    "signature": dict,
    "toolchain": str,
    "weights_digest": str,
}
_PADDINGS = ("zeros", "reflect", "replicate", "circular")


def seal(kernel: Kernel, key: bytes) -> bytes:
    """Write a kernel as a signed container.

    Raises:
        KernelError: The kernel would be refused when opened, or would come back different.
    """
    parts = {WEIGHTS: kernel.weights}
    parts |= {f"variant:{name}": kernel.variants[name] for name in sorted(kernel.variants)}
    table: list[dict[str, object]] = []
    offset = 0
    for name, content in parts.items():
        table.append({"name": name, "offset": offset, "sha256": _sha(content), "size": len(content)})
        offset += len(content)
    facts = {
        name: getattr(kernel, name) for name in ("id", "graph", "hidden", "seed", "pipeline", "toolchain")
    }
    facts |= {"signature": asdict(kernel.signature), "report": dict(kernel.report), "parts": table}
    facts |= {"weights_digest": _sha(kernel.weights), "published": is_published(kernel)}
    manifest = canonical(facts)
    if len(manifest) > MAX_MANIFEST or offset > MAX_PARTS_BYTES:
        raise KernelError(f"kernel {kernel.id} is too large: {len(manifest)} + {offset} bytes")
    payload = b"".join((manifest, *parts.values()))
    header = _HEADER.pack(MAGIC, VERSION, 0, len(manifest), offset)
    digest = hashlib.sha256(payload).digest()
    container = b"".join((header, digest, sign(key, header, digest, payload), payload))
    if open_sealed(container, key) != kernel:
        raise KernelError(f"kernel {kernel.id} would not come back as it is; a report holds lists, no tuples")
    return container


def open_sealed(container: bytes, key: bytes, kernel: str | None = None) -> Kernel:
    """Check a container and return its kernel; nothing is parsed that was not signed.

    Args:
        container: Bytes that ``seal`` wrote.
        key: Key it was sealed with, bytes.
        kernel: Id that was asked for; another kernel's container is refused.

    Raises:
        KernelError: It is damaged, unsigned, sealed with another key, of another version or not what it says.
    """
    manifest, parts = _unseal(container, key)
    facts = parse_object(manifest, "the manifest")
    if canonical(facts) != manifest:
        raise KernelError("the manifest is not in canonical form")
    _check_types(facts)
    contents = _read_parts(facts["parts"], parts)
    weights = contents.pop(WEIGHTS)
    if facts["weights_digest"] != _sha(weights):
        raise KernelError("the manifest's weights_digest is not that of the weights")
    found = Kernel(
        weights=weights,
        variants={name.removeprefix("variant:"): content for name, content in contents.items()},
        signature=_read_signature(facts["signature"]),
        **{
            name: facts[name] for name in ("id", "graph", "hidden", "seed", "pipeline", "toolchain", "report")
        },
    )
    derived = _derived_id(found, facts["published"])
    if found.id != derived:
        raise KernelError(f"the container says it is kernel {found.id[:80]!r}, its contents make {derived}")
    if kernel is not None and kernel != found.id:
        raise KernelError(f"this is the container of kernel {found.id}, asked for was {kernel}")
    parse_object(found.graph.encode(), "the graph")
    tensor_table(weights, WEIGHTS)
    for name, content in contents.items():
        check_archive(content, name, native=name == NATIVE)
    return found


def publish(kernel: Kernel, weights: bytes) -> Kernel:
    """Return a kernel with trained weights, under an id of its own that follows from them.

    Args:
        kernel: Kernel, initial or published.
        weights: Safetensors bytes with the names, types and shapes of the kernel's.

    Raises:
        KernelError: The weights are not those of this kernel.
    """
    if tensor_table(weights, "the trained weights") != tensor_table(kernel.weights, WEIGHTS):
        raise KernelError(
            f"the trained weights are not those of kernel {kernel.id}: names, types or shapes differ"
        )
    trained = replace(kernel, weights=weights)
    return replace(trained, id=_derived_id(trained, published=True))


def is_published(kernel: Kernel) -> bool:
    """Tell published weights, which are part of the id, from initial ones, which follow from the seed."""
    return kernel.id != _derived_id(kernel, published=False)


def _unseal(container: bytes, key: bytes) -> tuple[bytes, bytes]:
    """Check sizes, digest and signature, in this order; return manifest and parts."""
    if len(container) < _SEAL:
        raise KernelError(f"not a kernel's container: {len(container)} bytes, the seal alone has {_SEAL}")
    magic, version, zero, manifest_size, parts_size = _HEADER.unpack_from(container)
    if magic != MAGIC:
        raise KernelError(f"not a kernel's container: it starts with {magic!r}")
    if version != VERSION or zero != 0:
        raise KernelError(
            f"the container has format version {version}.{zero}, this Esper reads {VERSION}.0 only"
        )
    if manifest_size > MAX_MANIFEST or parts_size > MAX_PARTS_BYTES:
        raise KernelError(f"the container is oversize: it claims {manifest_size} + {parts_size} bytes")
    if len(container) != (whole := _SEAL + manifest_size + parts_size):
        raise KernelError(f"the container has {len(container)} bytes, its length fields say {whole}")
    view = memoryview(container)
    header, digest = view[: _HEADER.size], view[_HEADER.size : _SEAL - _SHA]
    signature, payload = view[_SEAL - _SHA : _SEAL], view[_SEAL:]
    if not hmac.compare_digest(hashlib.sha256(payload).digest(), digest):
        raise KernelError("the container is damaged: its SHA-256 digest is another")
    if not hmac.compare_digest(sign(key, header, digest, payload), signature):
        raise KernelError(
            "the container's signature does not hold: it was changed or sealed with another key"
        )
    return bytes(payload[:manifest_size]), bytes(payload[manifest_size:])


def _check_types(facts: Mapping[str, Any]) -> None:
    if facts.keys() != _MANIFEST.keys():
        raise KernelError(f"the manifest must have {', '.join(_MANIFEST)}; it has {', '.join(facts)[:200]}")
    for name, kind in _MANIFEST.items():
        if type(facts[name]) is not kind:
            raise KernelError(f"the manifest's {name} is not a {kind.__name__}")
    if not 0 <= facts["hidden"] < 1 << 31 or not -(1 << 63) <= facts["seed"] < 1 << 64:
        raise KernelError("the manifest's hidden or seed is out of range")
    if not _PIPELINE.fullmatch(facts["pipeline"]):
        raise KernelError(f"the manifest has a pipeline named {facts['pipeline'][:80]!r}")
    if not facts["toolchain"].isprintable() or len(facts["toolchain"]) > 1024:
        raise KernelError("the manifest's toolchain is not a line of text")


def _read_parts(table: list[object], parts: bytes) -> dict[str, bytes]:
    """Cut the parts out; they lie in order, end to end: the weights, then variants by name."""
    contents: dict[str, bytes] = {}
    position = 0
    for part in table:
        if not isinstance(part, dict) or part.keys() != {"name", "offset", "sha256", "size"}:
            raise KernelError("the manifest lists a part by other than name, offset, sha256 and size")
        name, offset, size = part["name"], part["offset"], part["size"]
        if not isinstance(name, str) or not _PART.fullmatch(name):
            raise KernelError(f"the manifest lists a part named {str(name)[:80]!r}")
        if not whole_numbers([offset, size], 2) or offset != position or size > len(parts) - position:
            raise KernelError(f"part {name} is not where the one before it ends, or reaches past the end")
        content = parts[position : position + size]
        if part["sha256"] != _sha(content):
            raise KernelError(f"part {name} is damaged: its SHA-256 digest is another")
        if name in contents:
            raise KernelError(f"part {name} is listed twice")
        contents[name], position = content, position + size
    if position != len(parts):
        raise KernelError(f"{len(parts) - position} bytes belong to no part")
    if list(contents) != [WEIGHTS, *sorted(contents.keys() - {WEIGHTS})]:
        raise KernelError(
            f"parts must be {WEIGHTS}, then variants by name; they are {', '.join(contents)[:200]}"
        )
    return contents


def _read_signature(facts: Mapping[str, object]) -> Signature:
    if facts.keys() != {field.name for field in fields(Signature)}:
        raise KernelError(f"the manifest's signature has other fields: {', '.join(facts)[:200]}")
    shapes = [facts[name] for name in ("kernel_size", "stride", "padding", "dilation")]
    if not all(whole_numbers(shape, 3) for shape in shapes):
        raise KernelError("the manifest's signature has a geometry that is not whole numbers")
    if not whole_numbers([facts["inputs"], facts["outputs"], facts["groups"]], 3):
        raise KernelError("the manifest's signature has channels that are not whole numbers")
    words = facts["layout"], facts["port"], facts["padding_mode"]
    allowed = ("vector", "sequence", "image"), ("parallel", "serial"), _PADDINGS
    if any(word not in known for word, known in zip(words, allowed, strict=True)):
        raise KernelError(f"the manifest's signature has an unknown word among {str(words)[:200]}")
    return Signature.from_dict(facts)


def _derived_id(kernel: Kernel, published: bool) -> str:
    base = kernel_id(
        kernel.graph, kernel.signature, kernel.hidden, kernel.seed, kernel.pipeline, kernel.toolchain
    )
    return _sha(canonical(["published", base, _sha(kernel.weights)])) if published else base


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
