"""Write the page on optimizers and schedulers: every class torch has, and its rule, from the code.

docs/generate.py writes it; tests/surgery/test_matrix.py is what the tables rest on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.optim.lr_scheduler import LRScheduler

from esper.kasmina.race.own_optimizers import needs_closure
from esper.surgery.optimizers.kinds import KINDS, Kind, everything, matrices

PAGE = """# Optimizers and schedulers

Growth changes what an optimizer trains while it trains it. These are the rules; every cell of both
tables, each optimizer with each scheduler, is run by `tests/surgery/test_matrix.py`, which asks
torch for its classes, so that a new one cannot slip past.

- **What is there stays.** State of old units is the same bits, `step` is kept, parameters keep their
  identity.
- **What is new** begins as the table says; `new_slot_state` can be `mean` (of the old units) or `seed`
  (what the branch's own optimizer has learned) instead.
- **What joins** joins groups that exist: the group that trains the place's own parameters of its sort
  (matrices, or vectors, which many exempt from decay), else one that trains any of the place's, else one
  that trains its sort, else the first whose optimizer takes it. So it has that group's learning rate,
  decay and schedule from its first step on. No group is ever added and there is no warm-up of its own: a
  branch has been trained by an optimizer like its layer's before it joins, and brings its state along
  where the classes are the same.
- **A cull** touches no optimizer. **A resumed run** repeats its growth first; then the states load, and
  it goes on bit for bit.
- Several optimizers are given by name, `esper.grow(net, {{"matrices": muon, "rest": adamw}}, ...)`.

## Optimizers

{optimizers}
A class that is not listed, your own say, is taken to keep one number per weight; if its state has another
shape, the growth is put back and the event says why. Whatever cannot train a branch on its own leaves
that to the first other optimizer that can, and without one to Adam at torch's own rate; an event says so.

The options `foreach`, `fused`, `amsgrad`, `nesterov`, `centered` and named parameters change nothing of
this. `maximize=True` in every group is refused: growth lowers what `loss_fn` returns, so let it return
the negative. torch itself refuses `differentiable=True` for the parameters of a module, and
`capturable=True` on a CPU.

## LBFGS

Its closure is called many times per step. That is one step for growth; call `growth.step` after it with
the loss it returned. A seed that is exposed sees the gradients of the last evaluation, and every
evaluation is counted as training. The closure must clear gradients, as torch asks.

```python
import torch
from torch import nn

import esper

net = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 1))
optimizer = torch.optim.LBFGS(net.parameters(), lr=0.3, max_iter=4)
x, held_out = torch.randn(64, 4), torch.randn(64, 4)


def loss_fn(net, x):
    return (net(x) - x.prod(1, keepdim=True)).square().mean()


def closure():
    optimizer.zero_grad()
    loss = loss_fn(net, x)
    loss.backward()
    return loss


growth = esper.grow(net, optimizer, loss_fn, probe=[held_out], steps=40)
for _ in range(40):
    growth.step(x, optimizer.step(closure))
growth.finish()
```

## Schedulers

No group comes or goes, so a scheduler does what it does without growth: all settings of all groups
(learning rates, cycled momenta) are equal, step by step, to those of a twin that never grew.

{schedulers}
## What else lives in a loop

| | rule |
| --- | --- |
| `AveragedModel` (`ema=`) | grows by the same plan; the average of what is new is the new itself |
| `clip_grad_norm_` | takes what `model.parameters()` lists, grown parts too; the seed clips on its own |
| `GradScaler` (`scaler=`) | a skipped step is no step, but with `fused`, which torch calls all the same |
| accumulation | `growth.step` after each micro-batch; it acts when the optimizer has stepped |
| gradients | those of widened parameters are cleared, all others stay |
"""


def optimizers_page() -> str:
    """Return the page."""
    return PAGE.format(
        optimizers=table(
            (
                "class",
                "widen: state of the new units",
                "graft: what joins",
                "trains a branch",
                "cull",
                "resume",
            ),
            optimizer_rows(),
        ),
        schedulers=table(
            ("class", "widen", "graft", "cull", "resume"),
            ([f"`{name}`", "as without", "as without", "as without", "bit for bit"] for name in schedulers()),
        ),
    )


def optimizer_rows() -> Iterator[list[str]]:
    kinds = (kind for kind in vars(torch.optim).values() if isinstance(kind, type))
    for kind in sorted((k for k in kinds if issubclass(k, Optimizer) and k is not Optimizer), key=order):
        rule = KINDS[kind.__name__]
        yield [f"`{kind.__name__}`", rule.says, joins(rule), trains(kind, rule), "untouched", "bit for bit"]


def schedulers() -> list[str]:
    found = [*vars(lr_scheduler).values(), *vars(swa_utils).values()]
    kinds = {kind for kind in found if isinstance(kind, type) and issubclass(kind, LRScheduler)}
    names = (kind.__name__ for kind in kinds - {LRScheduler})
    return sorted((name for name in names if not name.startswith("_")), key=str.lower)


def order(kind: type) -> str:
    return kind.__name__.lower()


def joins(rule: Kind) -> str:
    if rule.takes is everything:
        return "all; the history starts anew" if rule.history else "all"
    some = f"its {rule.wants}" if rule.takes is matrices else "nothing"
    return f"{some}; another optimizer takes the rest, without one branches are refused at the start"


def trains(kind: type[Optimizer], rule: Kind) -> str:
    if needs_closure(kind):
        return "no, a step needs a closure"
    return "yes" if rule.takes is everything else f"no, it is for {rule.wants}"


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(heads), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
