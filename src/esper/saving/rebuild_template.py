"""Load the grown model in this folder; needs torch and nothing else.

from rebuild import load
model = load(Net())  # the plain model, as it was built before it grew
"""

import copy
import functools
import hashlib
import json
import operator
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

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


def graft(model: Any, plan: dict[str, Any]) -> None:
    """Let a layer add what a branch computes: by weights of its own, and a hook that is a torch.fx module."""
    entry, last = model.get_submodule(plan["entry"]), model.get_submodule(plan["exit"])
    serial, like = plan["signature"]["port"] == "serial", next(model.parameters())
    apart = entry is not last and not serial
    graph = fx.Graph()
    held = graph.placeholder("kept") if apart else None
    module, args, kwargs, output = (graph.placeholder(n) for n in ("module", "args", "kwargs", "output"))
    y = found(graph, output, plan["writes"])
    if held is not None:
        x = graph.call_method("pop", (held, "x"))
    else:
        x = y if serial else found(graph, args if plan["reads"][0][0] == "args" else kwargs, plan["reads"])
    values = {"%x": x}
    for name, shape in plan["program"]["weights"]:
        own = f"grown_{plan['name']}_{name}"
        last.register_parameter(own, nn.Parameter(like.new_zeros(shape)))
        values[f"@{name}"] = graph.call_function(getattr, (module, own))
    for result, name, arguments in plan["program"]["instructions"]:
        if name not in FUNCTIONS:
            raise ValueError(f"a branch calls {name!r}, which is not one of its functions")
        call: Any = functools.reduce(getattr, name.split(".")[1:], torch)
        values[f"%{result}"] = graph.call_function(call, tuple(resolved(one, values) for one in arguments))
    dtype = graph.call_function(getattr, (y, "dtype"))
    part = graph.call_method("to", (values[plan["program"]["result"]], dtype))
    graph.output(renewed(graph, output, plan["writes"], graph.call_function(torch.add, (y, part))))
    hook: Any = fx.GraphModule(nn.Module(), graph, class_name="Branch")
    if apart:
        kept: dict[str, Any] = {}  # empty between passes
        first = functools.partial(keeping(plan["reads"]), kept)
        entry.register_forward_pre_hook(first, with_kwargs=True)
        hook = functools.partial(hook, kept)
    last.register_forward_hook(hook, with_kwargs=True)
    why = "torch.jit.script cannot hold the forward hook that adds a grown branch; use torch.export"
    for one in (entry, last):  # torch's compiler guards on this, and not on hooks
        one.__dict__.setdefault("forward", MethodType(type(one).forward, one))
        one.__dict__.setdefault("__prepare_scriptable__", functools.partial(torch._assert, False, why))


def keeping(reads: list[Any]) -> nn.Module:
    """Return a hook that keeps what a layer is called with, for the layer that ends the branch's place."""
    graph = fx.Graph()
    held, _, args, kwargs = (graph.placeholder(name) for name in ("kept", "module", "args", "kwargs"))
    x = found(graph, args if reads[0][0] == "args" else kwargs, reads)
    graph.call_method("update", (held, {"x": x}))
    graph.output(None)
    return fx.GraphModule(nn.Module(), graph, class_name="Kept")


def resolved(given: Any, values: dict[str, Any]) -> Any:
    """Return what an instruction's argument stands for: "%" is a value, "@" a weight."""
    if isinstance(given, list) and given and isinstance(given[0], str):
        return [values[name] for name in given]
    return values[given] if isinstance(given, str) and given[:1] in "%@" else given


def found(graph: fx.Graph, holder: Any, path: list[Any]) -> Any:
    """Return what lies at a path of nested tuples and mappings."""
    for kind, key in path:
        holder = graph.call_function(getattr if kind == "field" else operator.getitem, (holder, key))
    return holder


def renewed(graph: fx.Graph, holder: Any, path: list[Any], new: Any) -> Any:
    """Return what holds a tensor with another one in its place."""
    if not path:
        return new
    kind, key = path[0]
    inner = renewed(graph, found(graph, holder, path[:1]), path[1:], new)
    if kind in ("tuple", "list"):
        one = (inner,) if kind == "tuple" else [inner]
        before = graph.call_function(operator.getitem, (holder, slice(None, key)))
        behind = graph.call_function(operator.getitem, (holder, slice(key + 1, None)))
        begun = graph.call_function(operator.add, (before, one))
        return graph.call_function(operator.add, (begun, behind))
    if kind == "field":
        return graph.call_method("_replace", (holder,), {key: inner})
    if kind == "dict":
        return graph.call_function(operator.or_, (holder, {key: inner}))
    graph.call_method("__setitem__", (holder, key, inner))
    return holder


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
    try:
        return grown(model, folder)
    except (LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(
            f"{folder} is not such a folder, or of another model than this {type(model).__name__}: "
            f"{error!r:.300}; build the model anew before it is used"
        ) from error


def grown(model: nn.Module, folder: str | Path) -> nn.Module:
    """Check the folder's digests, and that the model is the one it was grown from; then grow and fill it."""
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
    if genome["format"] not in (2, 3, 4) or genome["base"] != shapes:
        raise ValueError(
            f"{folder} was grown from another model than this {type(model).__name__}, or is newer"
        )
    if empty := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
        raise ValueError(f"{empty[0]} is on the meta device; call model.to_empty(device=...) first")
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
