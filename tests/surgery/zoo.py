"""Every optimizer and every scheduler torch has, each as a user would make it for one small host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.optim.lr_scheduler import LRScheduler

Groups = list[dict[str, Any]]
Made = dict[str, Optimizer]  # by name; the first is the one in question
STEPS = 40  # of the longest schedule


def known_optimizers() -> set[str]:
    """Ask torch itself, so that a class that comes with a new version cannot slip past."""
    found = (kind for kind in vars(torch.optim).values() if isinstance(kind, type))
    return {kind.__name__ for kind in found if issubclass(kind, Optimizer) and kind is not Optimizer}


def known_schedulers() -> set[str]:
    found = [*vars(lr_scheduler).values(), *vars(swa_utils).values()]
    kinds = {kind for kind in found if isinstance(kind, type) and issubclass(kind, LRScheduler)}
    return {kind.__name__ for kind in kinds if kind is not LRScheduler and not kind.__name__.startswith("_")}


def dense(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if not name.startswith("words")]


def two_groups(model: nn.Module) -> Groups:
    """Matrices with decay, vectors without, as is usual."""
    vectors = [p for p in dense(model) if p.dim() == 1]
    return [
        {"params": [p for p in dense(model) if p.dim() > 1]},
        {"params": vectors, "weight_decay": 0.0},
    ]


def grouped(kind: Callable[..., Optimizer], **options: Any) -> Callable[[nn.Module], Made]:
    """Make one optimizer for everything."""
    return lambda model: {"main": kind(two_groups(model), **options)}


def muon(model: nn.Module) -> Made:
    matrices, vectors = two_groups(model)
    return {
        "matrices": torch.optim.Muon(matrices["params"], lr=0.02),
        "vectors": torch.optim.AdamW(vectors["params"], lr=0.01),
    }


def sparse(model: nn.Module) -> Made:
    words = nn.Embedding(6, 4, sparse=True)
    model.add_module("words", words)
    return {
        "words": torch.optim.SparseAdam(words.parameters(), lr=0.01),
        "rest": torch.optim.SGD(dense(model), lr=0.05, momentum=0.9),
    }


o = torch.optim
OPTIMIZERS: Mapping[str, Callable[[nn.Module], Made]] = {
    "Adadelta": grouped(o.Adadelta),
    "Adafactor": grouped(o.Adafactor, lr=0.05, weight_decay=0.01),
    "Adagrad": grouped(o.Adagrad, lr=0.05, initial_accumulator_value=0.1),
    "Adam": grouped(o.Adam, lr=0.02),
    "Adamax": grouped(o.Adamax, lr=0.02),
    "AdamW": grouped(o.AdamW, lr=0.02),
    "ASGD": grouped(o.ASGD, lr=0.02, t0=3),
    "LBFGS": lambda model: {"main": o.LBFGS(dense(model), lr=0.1, max_iter=4, line_search_fn="strong_wolfe")},
    "Muon": muon,
    "NAdam": grouped(o.NAdam, lr=0.02),
    "RAdam": grouped(o.RAdam, lr=0.02),
    "RMSprop": grouped(o.RMSprop, lr=0.003, momentum=0.9, centered=True),
    "Rprop": grouped(o.Rprop, lr=0.01),
    "SGD": grouped(o.SGD, lr=0.05, momentum=0.9, weight_decay=1e-4),
    "SparseAdam": sparse,
}
VARIANTS: Mapping[str, Callable[[nn.Module], Made]] = {
    "SGD without momentum": grouped(o.SGD, lr=0.05),
    "SGD nesterov foreach": grouped(o.SGD, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "SGD fused": grouped(o.SGD, lr=0.05, momentum=0.9, fused=True),
    "Adam for-loop": grouped(o.Adam, lr=0.02, foreach=False),
    "Adam amsgrad foreach": grouped(o.Adam, lr=0.02, amsgrad=True, foreach=True),
    "Adam maximize": grouped(o.Adam, lr=0.02, maximize=True),
    "AdamW fused": grouped(o.AdamW, lr=0.02, fused=True),
    "AdamW amsgrad": grouped(o.AdamW, lr=0.02, amsgrad=True),
    "Adagrad fused": grouped(o.Adagrad, lr=0.05, initial_accumulator_value=0.1, fused=True),
    "Adafactor foreach": grouped(o.Adafactor, lr=0.05, foreach=True),
    "NAdam decoupled foreach": grouped(o.NAdam, lr=0.02, decoupled_weight_decay=True, foreach=True),
    "Adadelta foreach": grouped(o.Adadelta, foreach=True),
    "RMSprop foreach": grouped(o.RMSprop, lr=0.003, foreach=True),
    "Rprop foreach": grouped(o.Rprop, lr=0.01, foreach=True),
    "LBFGS without search": lambda model: {"main": o.LBFGS(dense(model), lr=0.01, max_iter=4)},
    "Adam with names": lambda model: {"main": o.Adam(model.named_parameters(), lr=0.02)},
}

s = lr_scheduler


def sequential(it: Optimizer) -> LRScheduler:
    parts: list[LRScheduler] = [s.LinearLR(it, 0.5, total_iters=4), s.CosineAnnealingLR(it, STEPS)]
    return s.SequentialLR(it, parts, milestones=[4])


def cycles_momentum(it: Optimizer) -> bool:
    return bool({"momentum", "betas"} & set(it.defaults))


SCHEDULERS: Mapping[str, Callable[[Optimizer], LRScheduler]] = {
    "ChainedScheduler": lambda it: s.ChainedScheduler([s.ConstantLR(it, 0.5, 3), s.ExponentialLR(it, 0.95)]),
    "ConstantLR": lambda it: s.ConstantLR(it, 0.5, 3),
    "CosineAnnealingLR": lambda it: s.CosineAnnealingLR(it, STEPS),
    "CosineAnnealingWarmRestarts": lambda it: s.CosineAnnealingWarmRestarts(it, 4),
    "CyclicLR": lambda it: s.CyclicLR(it, 0.001, 0.02, 3, cycle_momentum=cycles_momentum(it)),
    "ExponentialLR": lambda it: s.ExponentialLR(it, 0.95),
    "LambdaLR": lambda it: s.LambdaLR(it, [lambda step: 0.9**step] * len(it.param_groups)),
    "LinearLR": lambda it: s.LinearLR(it, 0.5, total_iters=6),
    "MultiplicativeLR": lambda it: s.MultiplicativeLR(it, lambda step: 0.95),
    "MultiStepLR": lambda it: s.MultiStepLR(it, [3, 7]),
    "OneCycleLR": lambda it: s.OneCycleLR(it, 0.05, STEPS, cycle_momentum=cycles_momentum(it)),
    "PolynomialLR": lambda it: s.PolynomialLR(it, STEPS, power=2.0),
    "ReduceLROnPlateau": lambda it: s.ReduceLROnPlateau(it, patience=2, cooldown=1),
    "SequentialLR": sequential,
    "StepLR": lambda it: s.StepLR(it, 3, 0.5),
    "SWALR": lambda it: swa_utils.SWALR(it, swa_lr=0.005, anneal_epochs=5),
}


def settings(made: Made) -> list[dict[str, Any]]:
    """Everything the groups say but what they hold."""
    hidden = {"params", "param_names"}
    groups = [group for one in made.values() for group in one.param_groups]
    return [{key: value for key, value in group.items() if key not in hidden} for group in groups]


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 4, generator=generator)
    return x, torch.randint(6, (12,), generator=generator)


def loss_of(model: Any, given: tuple[Tensor, Tensor]) -> Tensor:
    x, tokens = given
    if hasattr(model, "words"):
        x = x + model.words(tokens)
    return (model(x) - given[0].sum(1, keepdim=True)).square().mean()
