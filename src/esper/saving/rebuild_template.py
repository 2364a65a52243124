"""Load the grown model in this folder; needs torch and nothing else.

from rebuild import load
model = load(Net())  # the plain model, as it was built before it grew
"""

import copy
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"C64": torch.complex64, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16}
DTYPES |= {"I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
FUNCTIONS = frozenset(  # all that a branch may call
    """torch.add torch.amax torch.cat torch.flatten torch.group_norm torch.layer_norm torch.log
    torch.matmul torch.mean torch.mul torch.narrow torch.nn.functional.conv2d
    torch.nn.functional.gelu torch.nn.functional.linear torch.nn.functional.pad
    torch.nn.functional.silu torch.ones_like torch.relu torch.sigmoid torch.softmax torch.tanh
    torch.transpose torch.tril torch.unflatten""".split()
)


class Branch(nn.Module):
    """What grew beside a layer: instructions in order over its weights; "%" is a value, "@" a weight."""

    def __init__(self, program: dict[str, Any], serial: bool) -> None:
        super().__init__()
        self.program, self.serial = program, serial
        self.x: Any = None
        for name, shape in program["weights"]:
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        for _, function, _ in program["instructions"]:
            if function not in FUNCTIONS:
                raise ValueError(f"a branch calls {function!r}, which is not one of its functions")

    def forward(self, x: Tensor) -> Tensor:
        """Run every instruction."""
        values: dict[str, Any] = {
            "%x": x,
            **{f"@{name}": weight for name, weight in self._parameters.items()},
        }

        def resolve(given: Any) -> Any:
            if isinstance(given, list) and given and isinstance(given[0], str):
                return [values[name] for name in given]
            return values[given] if isinstance(given, str) and given[:1] in "%@" else given

        for result, function, arguments in self.program["instructions"]:
            call: Any = functools.reduce(getattr, function.split(".")[1:], torch)
            values[f"%{result}"] = call(*map(resolve, arguments))
        return values[self.program["result"]]

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Keep what the layer was called with; a hook."""
        given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.is_floating_point()]
        self.x = given[0] if given else None

    def leave(self, module: nn.Module, args: Any, y: Any) -> Any:
        """Add to the first tensor the layer returned; a hook."""
        if isinstance(y, Tensor):
            return y + self(y if self.serial else self.x).to(y.dtype)
        if isinstance(y, dict):
            first = next(name for name, value in y.items() if isinstance(value, Tensor))
            return {**y, first: self.leave(module, args, y[first])}
        first = next(index for index, value in enumerate(y) if isinstance(value, Tensor))
        return type(y)([*y[:first], self.leave(module, args, y[first]), *y[first + 1 :]])


class Branches(nn.Module):
    """Holds the branches; in a Sequential it lets the input pass."""

    def forward(self, x: Any) -> Any:
        """Return the input."""
        return x


def graft(model: Any, plan: dict[str, Any]) -> None:
    """Hang a branch under the model and beside its layer."""
    if "grown" not in model._modules:
        model.add_module("grown", Branches())
    branch = Branch(plan["program"], plan["signature"]["port"] == "serial")
    branch.to(next(model.parameters()))
    model.grown.add_module(plan["name"], branch)
    model.get_submodule(plan["entry"]).register_forward_pre_hook(branch.enter, with_kwargs=True)
    model.get_submodule(plan["exit"]).register_forward_hook(branch.leave)


def deepen(model: Any, plan: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Put one more block behind its like; what that shares with the rest of the model is not copied."""
    container, donor = model.get_submodule(plan["container"]), model.get_submodule(plan["donor"])
    inside, own = set(map(id, donor.modules())), set(vars(nn.Module()))
    outside = [module for module in model.modules() if id(module) not in inside]
    held = [value for module in outside for name, value in vars(module).items() if name not in own]
    shared = {id(v): v for v in (*outside, *held) if id(v) not in inside and not isinstance(v, Tensor)}
    block = copy.deepcopy(donor, shared)
    prefix = f"{plan['container']}.{plan['name']}.".lstrip(".")
    for name, tensor in block.state_dict(keep_vars=True).items():
        tensor.data = tensor.new_zeros(weights[prefix + name].shape)
    children = list(container._modules.items())
    children.insert(plan["index"], (plan["name"], block))
    container._modules.clear()
    container._modules.update(children)
    for path, attribute, value in plan["counts"]:
        setattr(functools.reduce(getattr, filter(None, path.split(".")), model), attribute, value)


def load(model: nn.Module, folder: str | Path = Path(__file__).parent) -> nn.Module:
    """Grow ``model`` in place as it grew and load its weights; a ValueError says what does not fit."""
    sums, names = (Path(folder) / "SHA256SUMS").read_bytes(), ["genome.json", "model.safetensors"]
    if b"card.md" in sums or b"rebuild.py" in sums:  # older saves list two files
        names = ["card.md", *names, "rebuild.py"]
    content = {name: (Path(folder) / name).read_bytes() for name in names}
    lines = {name: f"{hashlib.sha256(part).hexdigest()}  {name}\n" for name, part in content.items()}
    for name, line in lines.items():
        if line.encode() not in sums:
            raise ValueError(f"{name} in {folder} is damaged: its SHA-256 is not in SHA256SUMS")
    if "".join(lines.values()).encode() != sums:
        raise ValueError(f"SHA256SUMS in {folder} is damaged")
    genome, data = json.loads(content["genome.json"]), content["model.safetensors"]
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    if genome["format"] not in (2, 3) or genome["base"] != shapes:
        raise ValueError(
            f"{folder} was grown from another model than this {type(model).__name__}, or is newer"
        )
    start = 8 + int.from_bytes(data[:8], "little")  # of the tensors, behind the header and its length
    header, blob = json.loads(data[8:start]), torch.frombuffer(bytearray(data[start:]), dtype=torch.uint8)
    weights: dict[str, Tensor] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            part = blob[slice(*entry["data_offsets"])].clone()  # a clone is aligned
            weights[name] = part.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    for plan in genome["plans"]:
        if plan["kind"] == "graft":
            graft(model, plan)
            continue
        if plan["kind"] == "deepen":
            deepen(model, plan, weights)
            continue
        own = model.state_dict(keep_vars=True)
        for edit in plan["edits"]:
            own[edit["name"]].data = own[edit["name"]].new_zeros(weights[edit["name"]].shape)
        for path, attribute, value in plan["attributes"]:
            setattr(model.get_submodule(path), attribute, value)
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()
    model.load_state_dict(weights)
    return model
