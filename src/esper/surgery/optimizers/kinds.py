"""What is special about the state of each optimizer of ``torch.optim``: one line each, and the page in docs/.

Most state holds one number per weight and is born as zeros; that needs no word here. A class that is not
listed, a user's own say, is taken to be of that kind; if its state has another shape, the growth is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.optim import Optimizer


def everything(parameter: Tensor) -> bool:
    """Take a parameter of any shape."""
    return True


def matrices(parameter: Tensor) -> bool:
    """Take a parameter that is a matrix."""
    return parameter.dim() == 2


def nothing(parameter: Tensor) -> bool:
    """Take no parameter of a grown branch."""
    return False


@dataclass(frozen=True, slots=True)
class Kind:
    """How the state of one class of optimizers follows growth.

    Attributes:
        says: Sentence on what becomes of the state when a layer widens, for the docs.
        born: State that is not born as zeros, with the setting of the group it is born as.
        reduced: State that is a mean over one axis of its parameter, with that axis.
        average: Key of an average of the weights themselves; a unit that has just come is its own.
        padded: New slices get the mean of the old ones where another class would get zeros.
        history: Whether the state spans all parameters at once, so nothing of it can follow.
        takes: Whether a parameter of a grown branch can join.
        wants: Words for the parameters it takes.
    """

    says: str
    born: Mapping[str, str] = field(default_factory=dict)
    reduced: Mapping[str, int] = field(default_factory=dict)
    average: str = ""
    padded: bool = False
    history: bool = False
    takes: Callable[[Tensor], bool] = everything
    wants: str = ""


_ZEROS = "one number per weight, the new ones zero"
_PLAIN = Kind(_ZEROS)
KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(("Adadelta", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD"), _PLAIN),
    # Its row factors are divided by their mean and its step is clipped over the whole tensor: with zeros the
    # old units' next step is a quarter of what it was (200 steps, 32 to 40 units), with the mean 0.9 to 1.06.
    "Adafactor": Kind(
        "row and column factors: the one along the grown axis and the vectors get the mean of the old units, "
        "the other one stays",
        reduced={"row_var": -1, "col_var": -2},
        padded=True,
    ),
    "Adagrad": Kind(
        "one number per weight, the new ones `initial_accumulator_value`",
        born={"sum": "initial_accumulator_value"},
    ),
    "ASGD": Kind("one number per weight; the average of a new unit is the unit itself", average="ax"),
    "LBFGS": Kind(
        "the history spans all parameters at once: it starts anew and an event says so", history=True
    ),
    "Muon": Kind(
        "the momentum is padded with zeros; torch scales its steps by the new shape",
        takes=matrices,
        wants="matrices",
    ),
    "Rprop": Kind(
        "one number per weight, new step sizes are the learning rate, all else zero", born={"step_size": "lr"}
    ),
    "SparseAdam": Kind(_ZEROS, takes=nothing, wants="sparse gradients"),
}


def kind_of(optimizer: Optimizer) -> Kind:
    """Return the kind of an optimizer, that of its nearest known base where the class itself is unknown."""
    known = (KINDS[base.__name__] for base in type(optimizer).__mro__ if base.__name__ in KINDS)
    return next(known, _PLAIN)
