"""Makes the user's own layers wider, in place: the end of a growth, when its branch becomes the model.

Every parameter keeps its identity through ``torch.utils.swap_tensors``, so optimizers and held lists go on
working. (Assigning ``parameter.data`` would not do: the next backward fails while the user still holds the
loss, because the graph's gradient accumulator remembers the old shape.) Torch refuses the swap while somebody
holds a weak reference to the parameter or a graph that has saved it; then a new Parameter takes its place and
the result says so.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from esper.contracts import WidenEdit, WidenPlan
from esper.errors import SurgeryError, nearest

_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True, slots=True)
class Change:
    """One parameter that became larger: what optimizers need to follow."""

    edits: tuple[WidenEdit, ...]  # in order; one, but where it grew along several axes
    parameter: nn.Parameter  # in the model now
    replaced: nn.Parameter | None = None  # what stood there before, where identity could not be kept
    why: str = ""  # what blocked the swap

    @property
    def edit(self) -> WidenEdit:
        """The first of its edits, which names it."""
        return self.edits[0]

    @property
    def previous(self) -> nn.Parameter:
        """The object an optimizer knows this parameter by."""
        return self.parameter if self.replaced is None else self.replaced


@dataclass(frozen=True, slots=True)
class Widened:
    """A widening that was carried out and can still be taken back; it keeps the old tensors alive."""

    plan: WidenPlan
    changes: tuple[Change, ...]  # parameters only, in the plan's order
    _restore: ExitStack = field(repr=False)

    @property
    def replaced(self) -> tuple[Change, ...]:
        """The parameters whose identity changed."""
        return tuple(change for change in self.changes if change.replaced is not None)

    def undo(self) -> None:
        """Put parameters, gradients, buffers and attributes back, bit for bit and in the old storage.

        Meant for a check that runs under ``torch.no_grad()`` right after the widening, before an optimizer
        has followed it. A second call does nothing.
        """
        self._restore.close()


class Holders:
    """Which modules hold which parameters: asked once where many places of a model are widened in a row.

    Args:
        model: Model whose modules stay the same meanwhile.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        owners: dict[nn.Parameter, set[nn.Module]] = {}  # a module under two names is one owner: no harm
        aliases: dict[nn.Parameter, list[str]] = {}
        for path, module in self.modules.items():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    owners.setdefault(parameter, set()).add(module)
                    aliases.setdefault(parameter, []).append(f"{path}.{leaf}".lstrip("."))
        self.tied = {n: aliases[p] for p, held in owners.items() if len(held) > 1 for n in aliases[p]}


def widen(
    model: nn.Module, plan: WidenPlan, slices: Mapping[str, Tensor], holders: Holders | None = None
) -> Widened:
    """Enlarge the tensors that ``plan`` names and set its attributes.

    The old part of every tensor stays bit for bit and comes first along the axis, or along each of its
    chunks. Gradients of widened parameters are cleared; ``requires_grad``, hooks, attributes, dtype, device
    and memory format stay. Either everything is changed or nothing.

    Args:
        model: Owner of every parameter, buffer and module the plan names.
        plan: Plan of what becomes how large.
        slices: Per key (``plan.keyed()``) the new part: the tensor's shape, as earlier edits left it, with
            ``new - old`` along ``axis``.
        holders: Holders of the model; looked up where they are not given.

    Raises:
        SurgeryError: The plan or a slice does not fit the model; nothing was changed.
    """
    holders = holders or Holders(model)
    modules = holders.modules
    _refuse_shared(holders, plan)
    grown = _extended(modules, plan, slices)
    for path, attribute, _ in plan.attributes:
        if not isinstance(getattr(modules.get(path), attribute, None), int):
            raise SurgeryError(
                f"cannot set {attribute!r} of {path!r}: no such number; {nearest(path, modules)}"
            )

    changes: list[Change] = []
    with ExitStack() as restore:
        owners = [modules[path] for path in dict.fromkeys(name.rpartition(".")[0] for name in grown)]
        recurrent = [owner for owner in owners if isinstance(owner, nn.RNNBase)]
        restore.callback(_hold_weights, recurrent)
        _let_go(recurrent)
        for name, tensor in grown.items():
            edits = tuple(edit for edit in plan.edits if edit.name == name)
            path, _, leaf = name.rpartition(".")
            if leaf in modules[path]._parameters:
                changes.append(_exchange(modules[path]._parameters, leaf, edits, tensor, restore))
            else:
                buffers = modules[path]._buffers
                restore.callback(buffers.__setitem__, leaf, buffers[leaf])
                buffers[leaf] = tensor
        for path, attribute, value in plan.attributes:
            restore.callback(setattr, modules[path], attribute, getattr(modules[path], attribute))
            setattr(modules[path], attribute, value)
        _hold_weights(recurrent)
        restore.callback(_let_go, recurrent)
        return Widened(plan, tuple(changes), restore.pop_all())


def extended(model: nn.Module, plan: WidenPlan, slices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that ``widen`` would give a model, by name; nothing is changed.

    Raises:
        SurgeryError: The plan or a slice does not fit the model.
    """
    return _extended(dict(model.named_modules(remove_duplicate=False)), plan, slices)


def asked(holders: Holders, plan: WidenPlan) -> dict[str, list[int]]:
    """Return the shapes that a plan's slices must have, on the model as it is."""
    shapes: dict[str, list[int]] = {}
    found: dict[str, list[int]] = {}
    for key, edit in plan.keyed():
        path, _, leaf = edit.name.rpartition(".")
        shape = shapes.setdefault(edit.name, list(getattr(holders.modules[path], leaf).shape))
        shape[edit.axis] = edit.new - edit.old
        found[key] = list(shape)
        shape[edit.axis] = edit.new
    return found


def empty_slices(model: nn.Module, plan: WidenPlan) -> dict[str, Tensor]:
    """Make zeros for every new slice of a plan, for weights that will be loaded afterwards."""
    state = model.state_dict()
    shapes = {edit.name: list(state[edit.name].shape) for edit in plan.edits}
    slices: dict[str, Tensor] = {}
    for key, edit in plan.keyed():
        shape = shapes[edit.name]
        shape[edit.axis] = edit.new - edit.old
        slices[key] = state[edit.name].new_zeros(shape)
        shape[edit.axis] = edit.new
    return slices


def put_in_place(
    model: nn.Module, tensors: Mapping[str, Tensor], read: Callable[[Tensor], object] = type
) -> None:
    """Write earlier weights and buffers into a model, whatever their shapes; parameters keep their identity.

    Args:
        model: Model whose parameters and buffers have these names.
        tensors: Tensors by name; they are not kept.
        read: Called with each of them when it has been read.
    """
    owners = {
        f"{path}.{leaf}".lstrip("."): (module, leaf)
        for path, module in model.named_modules(remove_duplicate=False)
        for leaf in (*module._parameters, *module._buffers)
    }
    recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    _let_go(recurrent)
    with torch.no_grad():
        for name, tensor in tensors.items():
            module, leaf = owners[name]
            own = dict(module._parameters.items()).get(leaf)  # the table of a scripted module has no get
            if own is None:
                buffer = module._buffers[leaf]
                if buffer is not None and buffer.shape == tensor.shape:
                    buffer.copy_(tensor)
                else:
                    module._buffers[leaf] = like(tensor, buffer)
            elif own.shape == tensor.shape:
                own.copy_(tensor)
            else:
                _put_back(own, like(tensor, own), None)
            read(tensor)
    _hold_weights(recurrent)


def like(tensor: Tensor, now: Tensor | None) -> Tensor:
    """Copy a tensor as the one is that it takes the place of: put aside since, or of another dtype by now."""
    return tensor.clone() if now is None else tensor.to(now.device, now.dtype, copy=True)


def extend(old: Tensor, new: Tensor, axis: int, chunks: int = 1) -> Tensor:
    """Append ``new`` to ``old`` along ``axis``, in the dtype, device and memory format of ``old``.

    Both are cut into ``chunks`` equal parts, and each part of ``new`` comes behind its part of ``old``.
    """
    pairs = zip(old.detach().chunk(chunks, axis), new.detach().to(old).chunk(chunks, axis), strict=True)
    # axis: old.shape[axis] + new.shape[axis]
    joined = torch.cat([part for pair in pairs for part in pair], axis)
    return joined.to(memory_format=_layout(old))  # contiguous() would leave a single channel as it is


def _layout(tensor: Tensor) -> torch.memory_format:
    # By strides, not is_contiguous(): a (C, 1, 3, 3) depthwise weight is contiguous in both formats.
    last = _LAYOUTS.get(tensor.dim())
    if last is None:
        return torch.contiguous_format
    plain = torch.empty(tensor.shape, device="meta")
    if tensor.stride() == plain.to(memory_format=last).stride() != plain.stride():
        return last
    return torch.contiguous_format


def _exchange(
    table: dict[str, nn.Parameter | None],
    leaf: str,
    edits: tuple[WidenEdit, ...],
    tensor: Tensor,
    restore: ExitStack,
) -> Change:
    parameter = table[leaf]
    if parameter is None:
        raise SurgeryError(f"{edits[0].name!r} went away while it was widened")
    old, gradient = parameter.detach(), parameter.grad  # the alias keeps the old storage for undo
    larger = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
    try:
        _swap_at_last(parameter, larger)
    except RuntimeError as blocked:  # torch's own words for a weak reference or a live graph
        larger.__dict__.update(parameter.__dict__)
        _arm_hooks(larger, parameter)
        restore.callback(table.__setitem__, leaf, parameter)
        table[leaf] = larger
        return Change(edits, larger, parameter, str(blocked))
    restore.callback(_put_back, parameter, old, gradient)
    return Change(edits, parameter)


def _let_go(recurrent: list[nn.RNNBase]) -> None:
    # Their weak references to their own weights would block the swap.
    for module in recurrent:
        module._flat_weight_refs = []


def _hold_weights(recurrent: list[nn.RNNBase]) -> None:
    # The list a recurrent layer runs on, and one piece of memory for all of it on CUDA.
    for module in recurrent:
        module._init_flat_weights()


def _swap_at_last(parameter: nn.Parameter, content: nn.Parameter) -> None:
    """Swap, once more without garbage where torch refuses: a graph that nobody holds may lie in a cycle."""
    try:
        _swap(parameter, content)
    except RuntimeError:
        gc.collect()
        _swap(parameter, content)


def _swap(parameter: nn.Parameter, content: nn.Parameter) -> None:
    """Give ``parameter`` the tensor of ``content``; its own attributes and hooks stay with it."""
    content.__dict__.update(parameter.__dict__)
    gradient, parameter.grad = parameter.grad, None
    try:
        torch.utils.swap_tensors(parameter, content)
    except RuntimeError:
        parameter.grad = gradient
        raise
    _arm_hooks(parameter, parameter)


def _arm_hooks(target: Tensor, source: Tensor) -> None:
    # A tensor's hook tables hang on the Python object but are armed in the C++ tensor; assigning one arms it.
    # The tables themselves stay the same, so the handles that users hold can still remove their hooks.
    if source._backward_hooks is not None:
        target._backward_hooks = source._backward_hooks
    if source._post_accumulate_grad_hooks is not None:
        target._post_accumulate_grad_hooks = source._post_accumulate_grad_hooks


def _put_back(parameter: nn.Parameter, old: Tensor, gradient: Tensor | None) -> None:
    # A fresh Parameter on the old storage: torch has poisoned the gradient accumulator of the swapped-out
    # tensor, and a user who still holds the last loss keeps that accumulator alive.
    try:
        _swap(parameter, nn.Parameter(old, requires_grad=parameter.requires_grad))
    except RuntimeError:  # the check left a reference behind; without a graph plain assignment is safe
        parameter.grad = None
        parameter.data = old
    parameter.grad = gradient


def _extended(
    modules: Mapping[str, nn.Module], plan: WidenPlan, slices: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    grown: dict[str, Tensor] = {}
    for key, edit in plan.keyed():
        old = grown[edit.name] if edit.name in grown else _found(modules, edit)
        _refuse_unfit(old, edit, key, slices)
        grown[edit.name] = extend(old, slices[key], edit.axis, edit.chunks)
    return grown


def _found(modules: Mapping[str, nn.Module], edit: WidenEdit) -> Tensor:
    path, _, leaf = edit.name.rpartition(".")
    owner = modules.get(path)
    old = None if owner is None else {**owner._buffers, **owner._parameters}.get(leaf)
    if old is None:
        raise SurgeryError(
            f"cannot widen {edit.name!r}: no such tensor; {nearest(edit.name, modules[''].state_dict())}"
        )
    if isinstance(old, nn.Parameter) and type(old) is not nn.Parameter:
        raise SurgeryError(
            f"cannot widen {edit.name!r}: it is a {type(old).__name__}; only a plain Parameter can be widened"
        )
    return old


def _refuse_unfit(old: Tensor, edit: WidenEdit, key: str, slices: Mapping[str, Tensor]) -> None:
    if not 0 <= edit.axis < old.dim() or old.shape[edit.axis] != edit.old or edit.new <= edit.old:
        raise SurgeryError(
            f"cannot widen {edit.name!r} from {edit.old} to {edit.new} along axis {edit.axis}: its shape is "
            f"{tuple(old.shape)}; plan the widening again on the model as it is now"
        )
    if edit.chunks < 1 or edit.old % edit.chunks or edit.new % edit.chunks:
        raise SurgeryError(
            f"cannot widen {edit.name!r} from {edit.old} to {edit.new} in {edit.chunks} equal parts"
        )
    if key not in slices:
        raise SurgeryError(f"no new slice given for {key!r}; given: {', '.join(slices) or 'none'}")
    # (*before, new - old, *behind)
    wanted = (*old.shape[: edit.axis], edit.new - edit.old, *old.shape[edit.axis + 1 :])
    if slices[key].shape != wanted:
        raise SurgeryError(
            f"the new slice of {key!r} has shape {tuple(slices[key].shape)}; {wanted} is needed"
        )


def _refuse_shared(holders: Holders, plan: WidenPlan) -> None:
    names = [edit.name for edit in plan.edits]
    if len({(edit.name, edit.axis) for edit in plan.edits}) < len(names):
        raise SurgeryError(
            f"the plan for {plan.site!r} names a tensor twice along one axis: {', '.join(names)}; "
            "plan it as two"
        )
    tied = next((holders.tied[name] for name in names if name in holders.tied), None)
    if tied is not None:
        raise SurgeryError(f"cannot widen a tied parameter: {' and '.join(tied)} are one tensor")
