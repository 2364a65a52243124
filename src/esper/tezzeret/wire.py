"""What the forge and its workers send each other: length-prefixed JSON with raw bytes behind it.

Nothing here can name code that runs on the forge's side: an answer is a kernel's facts and bytes, or the name
of one of four errors and a message. A request names a dataclass; only workers rebuild it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, BinaryIO, TypeAlias, cast, get_args, get_type_hints

from esper.contracts import Kernel, Signature, kernel_id
from esper.errors import BlueprintError, CompileError, EsperError, ForgeError, KernelError

Request: TypeAlias = object  # a frozen dataclass of JSON values, tuples and other such dataclasses
Frame: TypeAlias = tuple[dict[str, Any], dict[str, bytes]]  # header, parts by name

_LENGTHS = struct.Struct(">QI")  # of all that follows, of the header
_MESSAGE = 4000  # characters of an error that are kept; a graph's repr can be megabytes
_TRAVELLING = {kind.__name__: kind for kind in (BlueprintError, KernelError, CompileError, ForgeError)}


@dataclass(frozen=True, slots=True)
class Encoded:
    """A request as it is sent, and the digest that names it."""

    id: str
    frame: bytes


def pack(header: Mapping[str, object], parts: Mapping[str, bytes] | None = None) -> bytes:
    """Write one frame."""
    given = parts or {}
    lengths = [[name, len(part)] for name, part in given.items()]
    text = json.dumps({**header, "parts": lengths}, allow_nan=False).encode()
    total = len(text) + sum(map(len, given.values()))
    return b"".join([_LENGTHS.pack(total, len(text)), text, *given.values()])


def take(received: bytearray, most: int) -> Frame | None:
    """Read the frame ``received`` starts with and remove it, or return None while it is not all there.

    Raises:
        ForgeError: It is longer than ``most`` bytes, or not a frame.
    """
    if len(received) < _LENGTHS.size:
        return None
    total, text = _LENGTHS.unpack_from(received)
    if total > most or text > total:
        raise ForgeError(f"a worker sent {total} bytes, {most} are allowed; raise Limits.answer")
    end = _LENGTHS.size + total
    if len(received) < end:
        return None
    body = bytes(memoryview(received)[_LENGTHS.size : end])
    del received[:end]
    return _frame(body, text)


def receive(requests: BinaryIO) -> Frame | None:
    """Wait for the next frame of a trusted sender; None at the end."""
    lengths = requests.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    total, text = _LENGTHS.unpack(lengths)
    body = requests.read(total)
    return _frame(body, text) if len(body) == total else None


def _frame(body: bytes, text: int) -> Frame:
    try:
        header = json.loads(body[:text])
        parts: dict[str, bytes] = {}
        at = text
        for name, length in header.pop("parts"):
            parts[str(name)] = body[at : at + length]
            at += length
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ForgeError(f"a worker sent what is not a frame: {error}") from None
    return header, parts


def encode_request(request: Request, most: int) -> Encoded:
    """Write a request and name it by its digest: the same facts are the same request.

    Raises:
        ForgeError: It is no dataclass, holds what JSON cannot, or is longer than ``most`` bytes.
    """
    if not is_dataclass(request) or isinstance(request, type):
        raise ForgeError(f"a request is a frozen dataclass, not {type(request).__name__}")
    for field in fields(request):  # before anything is copied: 10⁶ nodes are 60 MB of JSON
        value = getattr(request, field.name)
        if isinstance(value, str) and len(value) > most:
            raise ForgeError(
                f"the request's {field.name} has {len(value)} characters, at most {most} are forged; "
                "raise Limits.request"
            )
    try:
        facts = json.dumps(asdict(request), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ForgeError(f"a request holds JSON values only: {error}") from None
    if len(facts) > most:
        raise ForgeError(
            f"the request has {len(facts)} bytes, at most {most} are forged; raise Limits.request"
        )
    kind = name_of(type(request))
    digest = hashlib.sha256(f"{kind}\n{facts}".encode()).hexdigest()
    return Encoded(digest, pack({"type": kind}, {"facts": facts.encode()}))


def decode_request(frame: Frame) -> Request:
    """Rebuild a request in the worker."""
    header, parts = frame
    return _rebuild(load(header["type"]), json.loads(parts["facts"]))


def encode_kernel(kernel: Kernel) -> bytes:
    """Write a kernel: facts in the header, weights and compiled forms behind it."""
    facts = {field.name: getattr(kernel, field.name) for field in fields(Kernel)}
    del facts["weights"], facts["variants"]
    facts |= {"signature": asdict(kernel.signature), "report": dict(kernel.report)}
    variants = {f"variant:{name}": form for name, form in kernel.variants.items()}
    return pack({"kernel": facts}, {"weights": kernel.weights, **variants})


def decode_kernel(frame: Frame) -> Kernel:
    """Read a worker's answer.

    Raises:
        EsperError: It says what went wrong.
        ForgeError: It is no kernel, or its id is not the digest of what makes it.
    """
    header, parts = frame
    if "error" in header:
        raise _error(header["error"])
    try:
        facts = dict(header["kernel"])
        facts["signature"] = Signature.from_dict(facts["signature"])
        weights = parts.pop("weights")
        variants = {name.removeprefix("variant:"): form for name, form in parts.items()}
        kernel = Kernel(**facts, weights=weights, variants=variants)
        expected = kernel_id(
            kernel.graph, kernel.signature, kernel.hidden, kernel.seed, kernel.pipeline, kernel.toolchain
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ForgeError(f"a worker answered with what is not a kernel: {error}") from None
    if kernel.id != expected:
        raise ForgeError(f"a worker answered with kernel {kernel.id}, its facts have the digest {expected}")
    return kernel


def encode_error(error: BaseException) -> bytes:
    """Write what a build raised; errors of other trees travel as a CompileError that names them."""
    kind, message = type(error).__name__, str(error)
    if kind not in _TRAVELLING:
        kind, message = "CompileError", f"the build raised {kind}: {message}"
    return pack({"error": {"kind": kind, "message": message[:_MESSAGE]}})


def _error(told: Mapping[str, str]) -> EsperError:
    return _TRAVELLING.get(told["kind"], ForgeError)(told["message"])


def name_of(thing: Callable[..., object]) -> str:
    """Return ``"module:name"`` of a class or function.

    Raises:
        ForgeError: A worker could not import it by that name.
    """
    module, name = thing.__module__, thing.__qualname__
    if module == "__main__" or "<" in name:
        raise ForgeError(
            f"{name} of {module} cannot be imported by a worker; define it at the top level of a module"
        )
    return f"{module}:{name}"


def load(name: str) -> Any:
    """Import what ``"module:name"`` names.

    Raises:
        ForgeError: There is no such thing.
    """
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ForgeError(f"a worker cannot import {name!r}: {error}; give 'module:function'") from None
    return found


def _rebuild(kind: type, facts: Mapping[str, object]) -> object:
    """Undo ``asdict`` and JSON: nested dataclasses by their hints, lists back to tuples."""
    hints = get_type_hints(kind)
    return kind(**{name: _value(hints.get(name), value) for name, value in facts.items()})


def _value(hint: object, value: object) -> object:
    if isinstance(value, dict):
        nested = [one for one in (hint, *get_args(hint)) if isinstance(one, type) and is_dataclass(one)]
        return _rebuild(cast(type, nested[0]), value) if nested else value
    return tuple(_value(None, item) for item in value) if isinstance(value, list) else value
