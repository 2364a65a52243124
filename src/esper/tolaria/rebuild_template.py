"""Load the grown model in this folder; needs torch and nothing else.

from rebuild import load
model = load(Net())  # the plain model, as it was built before it grew
"""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor, nn

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"C64": torch.complex64, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16}
DTYPES |= {"I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def load(model: nn.Module, folder: str | Path = Path(__file__).parent) -> nn.Module:
    """Widen ``model`` in place as it grew and load its weights; a ValueError says what does not fit."""
    content = {name: (Path(folder) / name).read_bytes() for name in ("genome.json", "model.safetensors")}
    sums = (Path(folder) / "SHA256SUMS").read_text().splitlines()
    for name, part in content.items():
        if f"{hashlib.sha256(part).hexdigest()}  {name}" not in sums:
            raise ValueError(f"{name} in {folder} is damaged: its SHA-256 is not in SHA256SUMS")
    genome, data, own = (
        json.loads(content["genome.json"]),
        content["model.safetensors"],
        model.state_dict(keep_vars=True),
    )
    if genome["format"] != 1 or genome["base"] != {name: list(tensor.shape) for name, tensor in own.items()}:
        raise ValueError(
            f"{folder} was grown from another model than this {type(model).__name__}, or is newer"
        )
    start = 8 + int.from_bytes(data[:8], "little")  # of the tensors, behind the header and its length
    header, blob = json.loads(data[8:start]), torch.frombuffer(bytearray(data[start:]), dtype=torch.uint8)
    weights: dict[str, Tensor] = {}
    for name in own:
        entry = header[name]
        part = blob[slice(*entry["data_offsets"])].clone()  # a clone is aligned
        weights[name] = part.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    for plan in genome["plans"]:
        for edit in plan["edits"]:
            own[edit["name"]].data = own[edit["name"]].new_zeros(weights[edit["name"]].shape)
        for path, attribute, value in plan["attributes"]:
            setattr(model.get_submodule(path), attribute, value)
    model.load_state_dict(weights)
    return model
