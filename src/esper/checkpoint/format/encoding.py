"""Nested state as JSON and named tensors, and back: nothing is pickled, and nothing is guessed.

``None``, ``bool``, ``int``, ``str``, finite numbers and lists stand for themselves. Everything else is an
object with one tag: ``{"tuple": […]}``, ``{"dict": {…}}``, ``{"tensor": name}``. Dictionaries that have keys
other than strings are lists of pairs. What has no tag is refused with its path.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from esper.errors import CheckpointError

MAX_DEPTH = 64  # nested containers; an optimizer's state needs 5, a growing run's 8
# As safetensors calls them; others (quantised, complex128, …) are refused.
DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_MAPPINGS = (dict, OrderedDict, defaultdict)
_ARRAY_KINDS = "biufc"  # truth values and numbers


class Packing:
    """Turns one state into JSON values, and copies its tensors out under names made of their paths.

    Args:
        spare: Tensors of an earlier copy that nobody needs; written over where name, type and shape fit.
            Memory that was never touched costs more than the copy itself: 120 MB take 160 ms instead of 40.
    """

    def __init__(self, spare: Mapping[str, Tensor] | None = None) -> None:
        self.spare = spare or {}
        self.tensors: dict[str, Tensor] = {}
        self.known: dict[tuple[object, ...], str] = {}  # the same memory twice is stored once: tied weights

    def pack(self, value: Any, path: str = "", depth: int = 0) -> object:
        """Encode one value.

        Raises:
            CheckpointError: There is something in it that cannot be encoded; the message names its path.
        """
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if depth > MAX_DEPTH:
            raise CheckpointError(
                f"cannot keep {path[:80]!r}: it is nested deeper than {MAX_DEPTH}, or in itself"
            )
        if kind is list:
            return [self.pack(item, f"{path}/{i}", depth + 1) for i, item in enumerate(value)]
        if kind in (tuple, torch.Size):
            return {"tuple": [self.pack(item, f"{path}/{i}", depth + 1) for i, item in enumerate(value)]}
        if kind is Counter:
            return {"counter": self._pairs(value, path, depth)}
        if kind in _MAPPINGS:
            if all(type(key) is str for key in value):
                return {"dict": {k: self.pack(v, f"{path}/{k}", depth + 1) for k, v in value.items()}}
            return {"pairs": self._pairs(value, path, depth)}
        if kind is bytes:
            return {"bytes": base64.b64encode(value).decode()}
        if isinstance(value, np.ndarray | np.generic):
            return self._array(value, path)
        if kind in (Tensor, nn.Parameter):
            return self._tensor(value, path)
        raise CheckpointError(
            f"cannot keep {path or 'the state'!r}, a {kind.__module__}.{kind.__qualname__}: a checkpoint "
            "holds tensors, arrays, numbers, strings, bytes, None, and lists, tuples and dicts of them"
        )

    def _pairs(self, value: Mapping[object, object], path: str, depth: int) -> list[list[object]]:
        return [
            [self.pack(k, f"{path}/key {k!r}", depth + 1), self.pack(v, f"{path}/{k}", depth + 1)]
            for k, v in value.items()
        ]

    def _array(self, value: np.ndarray | np.generic, path: str) -> dict[str, object]:
        if value.dtype.kind not in _ARRAY_KINDS:
            raise CheckpointError(f"cannot keep {path!r}, an array of {value.dtype}: only numbers are kept")
        content = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        whole = [value.dtype.str, list(value.shape), content]
        return {"array" if isinstance(value, np.ndarray) else "scalar": whole}

    def _tensor(self, value: Tensor, path: str) -> dict[str, object]:
        if value.layout is not torch.strided or value.dtype not in DTYPES or value.is_meta:
            raise CheckpointError(
                f"cannot keep {path!r}, a tensor of {value.dtype} and {value.layout} on {value.device}: only "
                "dense tensors of ordinary types are kept"
            )
        memory = value.untyped_storage().data_ptr(), value.storage_offset(), value.device
        identity = (*memory, value.dtype, tuple(value.shape), value.stride())
        if identity not in self.known or not value.numel():
            self.known[identity] = name = self._name(path)
            self.tensors[name] = self._copy(value.detach(), name)
        found: dict[str, object] = {"tensor": self.known[identity]}
        return found if value.device.type == "cpu" else {**found, "device": str(value.device)}

    def _copy(self, value: Tensor, name: str) -> Tensor:
        old = self.spare.get(name)
        if old is None or old.dtype != value.dtype or old.shape != value.shape:
            return value.to("cpu", copy=True, memory_format=torch.contiguous_format)
        return old.copy_(value)

    def _name(self, path: str) -> str:
        name = path.removeprefix("/") or "tensor"
        while name in self.tensors or name == "__metadata__":  # a key may hold a slash itself
            name += "'"
        return name


class Unpacking:
    """Turns what :class:`Packing` made back into what it was made of.

    Args:
        tensors: By name; those of a device that this machine does not have stay on the CPU.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.given: set[str] = set()

    def unpack(self, value: object, depth: int = 0) -> object:
        """Decode one value.

        Raises:
            CheckpointError: It was not encoded by this format.
        """
        if depth > MAX_DEPTH + 2:
            raise CheckpointError(f"the state is nested deeper than {MAX_DEPTH}")
        if isinstance(value, list):
            return [self.unpack(item, depth + 1) for item in value]
        if not isinstance(value, dict):
            return value
        try:
            return self._tagged(value, depth + 1)
        except CheckpointError:
            raise  # of a value inside this one; it is a ValueError too
        except (LookupError, ValueError, TypeError, AttributeError, StopIteration, RuntimeError) as error:
            raise CheckpointError(f"the state is not in a checkpoint's format: {error!r:.200}") from error

    def _tagged(self, value: dict[str, Any], depth: int) -> object:
        tag, content = next(iter(value.items()))
        if tag == "dict":
            return {key: self.unpack(item, depth) for key, item in content.items()}
        if tag == "tuple":
            return tuple(self.unpack(item, depth) for item in content)
        if tag == "tensor":
            return self._tensor(content, value.get("device", "cpu"))
        if tag in ("pairs", "counter"):
            pairs = {self.unpack(key, depth): self.unpack(item, depth) for key, item in content}
            return pairs if tag == "pairs" else Counter(pairs)
        if tag in ("array", "scalar"):
            kind, shape, text = content
            array = np.frombuffer(base64.b64decode(text), np.dtype(kind)).reshape(shape).copy()
            return array if tag == "array" else array[()]
        if tag == "float":
            return float(content)
        if tag == "bytes":
            return base64.b64decode(content)
        raise CheckpointError(f"the state has a value of the unknown kind {tag[:80]!r}; update esper-morph")

    def _tensor(self, name: str, device: str) -> Tensor:
        tensor = self.tensors[name]
        if name in self.given:  # each place gets memory of its own; who ties weights ties them again
            tensor = tensor.clone()
        self.given.add(name)
        return tensor.to(device) if _exists(device) else tensor


def _exists(device: str) -> bool:
    if not device.startswith("cuda"):
        return True
    return torch.cuda.is_available() and (torch.device(device).index or 0) < torch.cuda.device_count()
