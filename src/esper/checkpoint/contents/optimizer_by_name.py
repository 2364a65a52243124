"""An optimizer's state under the names of its parameters, never their index.

``Optimizer.load_state_dict`` goes by position: with the same parameters in another order it puts momentum on
the wrong tensors and says nothing (measured with torch 2.13, with ``named_parameters`` too).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from esper.checkpoint.contents.private_api import mark_stepped
from esper.checkpoint.format.run_state import GroupState, OptimizerState
from esper.errors import StateError, nearest


def names_of(modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """Map every parameter's identity to its name; the module "" gives no prefix. A tied one has one name."""
    names: dict[int, str] = {}
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters():
            names.setdefault(id(parameter), f"{prefix}.{name}" if prefix else name)
    return names


def named_groups(optimizer: Optimizer, modules: Mapping[str, nn.Module], where: str) -> list[list[str]]:
    """Return the names of each group's parameters.

    Raises:
        StateError: A parameter belongs to no module.
    """
    names = names_of(modules)
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise StateError(
                    f"optimizer {where!r} has a parameter of shape {tuple(parameter.shape)} in group "
                    f"{number} that belongs to no module of the run; give its module in modules="
                )
        groups.append([names[id(parameter)] for parameter in group["params"]])
    return groups


def named_state(optimizer: Optimizer, modules: Mapping[str, nn.Module], where: str) -> OptimizerState:
    """Return an optimizer's groups and state, by name."""
    groups = named_groups(optimizer, modules, where)
    plain = optimizer.state_dict()
    settings = [
        {k: v for k, v in g.items() if k not in ("params", "param_names")} for g in plain["param_groups"]
    ]
    by_index = {
        index: name
        for group, names in zip(plain["param_groups"], groups, strict=True)
        for index, name in zip(group["params"], names, strict=True)
    }
    return {
        "kind": type(optimizer).__name__,
        "groups": [{"names": n, "settings": s} for n, s in zip(groups, settings, strict=True)],
        # LBFGS keeps all it knows under its first parameter
        "state": {by_index[index]: value for index, value in plain["state"].items()},
    }


def load_named_state(
    optimizer: Optimizer, state: OptimizerState, modules: Mapping[str, nn.Module], where: str
) -> None:
    """Give an optimizer back its state; within a group the order of parameters may be another one.

    Groups stay in order, because schedulers know them by their position.

    Raises:
        StateError: It is of another class, or groups the parameters otherwise.
    """
    if state["kind"] != type(optimizer).__name__:
        raise StateError(
            f"the checkpoint's optimizer {where!r} is {state['kind']}, the run's {type(optimizer).__name__}"
        )
    groups = named_groups(optimizer, modules, where)
    plain = optimizer.state_dict()
    index = {
        name: number
        for group, names in zip(plain["param_groups"], groups, strict=True)
        for number, name in zip(group["params"], names, strict=True)
    }
    if [set(names) for names in groups] != [set(group["names"]) for group in state["groups"]]:
        raise StateError(_other_groups(where, state["groups"], groups))
    for group, saved in zip(plain["param_groups"], state["groups"], strict=True):
        kept = {"params": group["params"]} | {k: v for k, v in group.items() if k == "param_names"}
        group.clear()
        group.update(saved["settings"] | kept)
    plain["state"] = {index[name]: value for name, value in state["state"].items()}
    optimizer.load_state_dict(plain)
    _undo_casts(optimizer, state["state"], groups)
    if state["state"]:
        mark_stepped(optimizer)


def _undo_casts(
    optimizer: Optimizer, saved: Mapping[str, Mapping[str, object]], groups: list[list[str]]
) -> None:
    """Put back what torch cast to the parameter's type: float32 moments would lose 16 bits."""
    for group, names in zip(optimizer.param_groups, groups, strict=True):
        for parameter, name in zip(group["params"], names, strict=True):
            mine = optimizer.state.get(parameter, {})
            for key, value in saved.get(name, {}).items():
                if (
                    isinstance(value, Tensor)
                    and isinstance(mine.get(key), Tensor)
                    and mine[key].dtype != value.dtype
                ):
                    mine[key] = value.to(mine[key].device, copy=True)


def _other_groups(where: str, saved: list[GroupState], given: list[list[str]]) -> str:
    was = {name: number for number, group in enumerate(saved) for name in group["names"]}
    now = {name: number for number, names in enumerate(given) for name in names}
    for name in now:
        if name not in was:
            return f"optimizer {where!r} has {name!r}, the checkpoint's has not; {nearest(name, was)}"
    for name in was:
        if name not in now:
            return (
                f"the checkpoint's optimizer {where!r} has {name!r}, the run's has not; {nearest(name, now)}"
            )
    return (
        f"optimizer {where!r} has {len(given)} groups, the checkpoint's {len(saved)}, or parameters in other "
        "groups; build it as the run did that was saved"
    )
