"""What a container may hold: strict JSON, bounded safetensors, plain archives; checked without a loader."""

from __future__ import annotations

import io
import json
import math
import re
import stat
import struct
import zipfile
import zlib
from typing import Any, NoReturn

from esper.errors import KernelError

MAX_DEPTH = 32  # nested lists and objects; a manifest needs 5, a graph 6
MAX_HEADER = 1 << 20  # bytes of a safetensors header; 4,096 tensors need 0.4 MiB
MAX_ENTRIES = 4096  # tensors of a kernel, files of an archive
MAX_UNPACKED = 1 << 30  # bytes an archive may unpack to
DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes per number; parameters are never integers
TENSOR_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.\-]{0,127}")
ARCHIVE = b"PK\x03\x04"
_PICKLES = (".pt", ".pth", ".pkl", ".pickle")
_PICKLE_STARTS = tuple(bytes((0x80, protocol)) for protocol in range(1, 6))
_TENSOR_FOLDERS = ("weights", "constants", "sample_inputs")  # torch's names; it unpickles some files there
_TORN = (
    ValueError,
    OSError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    RuntimeError,
    struct.error,
)
_STRING, _BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL), re.compile(r"[\[\]{}]")


def canonical(value: object) -> bytes:
    """Write a value in the only form that is accepted back: sorted keys, no spaces, UTF-8, finite numbers.

    Raises:
        KernelError: The value holds what JSON cannot.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode()
    except (TypeError, ValueError) as error:  # a lone surrogate is a ValueError of encode
        raise KernelError(f"cannot be written as strict JSON: {error}") from None


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """Read a JSON object that repeats no key, nests no deeper than 32 and has finite numbers only.

    Raises:
        KernelError: It is anything else.
    """

    def refuse(what: str) -> NoReturn:
        raise KernelError(f"{where} {what}")

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        return found if len(found) == len(pairs) else refuse("repeats a key")

    def finite(text: str) -> float:
        number = float(text)
        return number if math.isfinite(number) else refuse(f"holds {text}, which is not finite")

    try:
        text = data.decode("utf-8")
        if _depth(text) > MAX_DEPTH:
            refuse(f"nests deeper than {MAX_DEPTH}")
        value = json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except KernelError:
        raise
    except ValueError as error:
        raise KernelError(f"{where} is not JSON: {error}") from None
    return value if isinstance(value, dict) else refuse("is not a JSON object")


def _depth(text: str) -> int:
    level = deepest = 0
    for bracket in _BRACKET.findall(_STRING.sub("", text)):
        level += 1 if bracket in "[{" else -1
        deepest = max(deepest, level)
    return deepest


def tensor_table(data: bytes, where: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Check a safetensors file to its last byte and list its tensors as name: (dtype, shape).

    Tensors must fill the file without a gap or an overlap, under plain names, in floating types.

    Raises:
        KernelError: It is anything else, or its header is larger than 1 MiB.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER, len(data) - 8):
        raise KernelError(f"{where} is not safetensors: its header claims {length} of {len(data)} bytes")
    header = parse_object(data[8 : 8 + length], f"the header of {where}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise KernelError(f"{where} has metadata that is not text")
    if len(header) > MAX_ENTRIES:
        raise KernelError(f"{where} has {len(header)} tensors; {MAX_ENTRIES} are allowed")
    spans: list[tuple[int, int]] = []
    table: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, entry in header.items():
        begin, end, table[name] = _tensor(name, entry, where)
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise KernelError(f"{where} has tensors that overlap or leave a gap at byte {position}")
        position = end
    if position != len(data) - 8 - length:
        raise KernelError(
            f"{where} has {len(data) - 8 - length} bytes of tensors, its header says {position}"
        )
    return table


def _tensor(name: str, entry: object, where: str) -> tuple[int, int, tuple[str, tuple[int, ...]]]:
    if not TENSOR_NAME.fullmatch(name):
        raise KernelError(f"{where} has a tensor named {name[:80]!r}; letters, digits, _ . and - are allowed")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise KernelError(f"{where} describes {name!r} by other than dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise KernelError(f"{where} has {name!r} of type {str(dtype)[:20]!r}; allowed: {', '.join(DTYPES)}")
    if not whole_numbers(shape, 8) or not whole_numbers(offsets, 2) or len(offsets) != 2:
        raise KernelError(f"{where} has {name!r} with a shape or offsets that are not whole numbers")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype]:
        raise KernelError(f"{where} has {name!r} of shape {shape} in {offsets[1] - offsets[0]} bytes")
    return offsets[0], offsets[1], (dtype, tuple(shape))


def whole_numbers(values: object, most: int) -> bool:
    """Tell a short list of integers from 0 to 2⁴⁰ from everything else; True and 1.0 are not integers."""
    return (
        isinstance(values, list)
        and len(values) <= most
        and all(type(value) is int and 0 <= value <= 1 << 40 for value in values)
    )


def check_archive(data: bytes, where: str, native: bool = False) -> None:
    """Refuse what is not a plain archive of text and, if ``native``, machine code.

    Loaders of compiled forms unpack an archive under the names it gives, and unpickle what it holds of
    tensors. A form holds none: they are its arguments.

    Raises:
        KernelError: It is no zip archive, has a name that leads elsewhere or comes twice, a link, an
            encrypted file, a pickle, machine code where none belongs, or too many bytes when unpacked.
    """
    if not data.startswith(ARCHIVE):
        raise KernelError(f"{where} is not an archive; it starts with {data[:8]!r}")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _check_files(archive.infolist(), where)
            for file in archive.infolist():
                with archive.open(file) as content:
                    _check_start(file.filename, content.read(4), where, native)
    except KernelError:
        raise
    except _TORN as error:
        raise KernelError(f"{where} is not a whole archive: {error}") from None


def _check_files(files: list[zipfile.ZipInfo], where: str) -> None:
    names = [file.orig_filename for file in files]
    if len(set(names)) != len(names) or len(names) > MAX_ENTRIES:
        raise KernelError(f"{where} repeats a name or has more than {MAX_ENTRIES} files")
    for file, name in zip(files, names, strict=True):
        if not name.isprintable() or "\\" in name or ":" in name or {"", "..", "."} & {*name.split("/")}:
            raise KernelError(f"{where} has a file named {name[:80]!r}, which could land elsewhere")
        if stat.S_ISLNK(file.external_attr >> 16) or file.flag_bits & 1:
            raise KernelError(f"{where} has {name[:80]!r}, a link or an encrypted file")
    if (unpacked := sum(file.file_size for file in files)) > MAX_UNPACKED:
        raise KernelError(f"{where} unpacks to {unpacked} bytes; {MAX_UNPACKED} are allowed")


def _check_start(name: str, start: bytes, where: str, native: bool) -> None:
    """Refuse a file by what it starts with; torch leaves the file of its example inputs empty."""
    folder, suffix = name.split("/")[-2:-1], name[name.rfind(".") :]
    tensors = suffix in _PICKLES or (folder and folder[0] in _TENSOR_FOLDERS and suffix != ".json")
    if (start and tensors) or start.startswith((*_PICKLE_STARTS, ARCHIVE)):
        raise KernelError(f"{where} has {name[:80]!r}, which a loader might unpickle")
    if start == b"\x7fELF" and not native:
        raise KernelError(f"{where} has {name[:80]!r}, machine code that does not belong there")
