"""What a loss reaches may raise when it is asked, or answer for something else: kind J."""

from __future__ import annotations

import random
import weakref
from array import array
from collections import ChainMap, OrderedDict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.surgery.isolation.surroundings import Surroundings
from tests.cases.loops import cross_entropy, narrow, run

STEPS = 24


class Silent:
    """Raises whatever attribute it is asked for."""

    def __getattribute__(self, name: str) -> Any:
        """Raise."""
        raise RuntimeError(f"unbound: {name}")


class Missing:
    """Raises for attributes that it lacks, in another way than Python."""

    __slots__ = ("never",)

    def __getattr__(self, name: str) -> Any:
        """Raise."""
        raise RuntimeError(name)


class Unbound:
    """Raises when asked for its class, as a proxy without an object."""

    @property
    def __class__(self) -> Any:
        """Raise."""
        raise RuntimeError("unbound")


class Lying:
    """Says it is a function."""

    @property
    def __class__(self) -> Any:
        """Lie."""
        return type(narrow)


class Unequal:
    """Cannot be compared."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        """Raise."""
        raise ValueError("not comparable")


class Loud(dict[str, int]):
    """A dict that cannot be looked through."""

    def __iter__(self) -> Any:
        """Raise."""
        raise RuntimeError("iter")

    def __len__(self) -> int:
        """Raise."""
        raise RuntimeError("len")


class Nameless(type):
    """A class of classes without a hash."""

    def __eq__(cls, other: object) -> bool:
        """Raise."""
        raise RuntimeError("eq")

    __hash__ = None  # type: ignore[assignment]


class Owner:
    """Has what raises in its class."""

    silent: ClassVar[Any] = Missing()
    calls = 0

    def count(self) -> None:
        """Count in the class."""
        Owner.calls += 1


def gone() -> Any:
    """Return a proxy of what is no more."""
    return weakref.proxy(Owner())


STRANGE: dict[str, Callable[[], Any]] = {
    "silent": Silent,
    "missing": Missing,
    "unbound": Unbound,
    "lying": Lying,
    "unequal": lambda: [{Unequal(), Unequal()}, deque([Unequal()])],
    "loud": lambda: Loud(a=1),
    "nameless": lambda: Nameless("Kind", (), {})(),
    "proxy": gone,
    "system": random.SystemRandom,
    "class": Owner,
}
BARE: Any = None


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("where", ["cell", "global", "holder", "model"])
def test_a_run_grows_whatever_its_loss_reaches(
    kind: str, where: Literal["cell", "global", "holder", "model"], monkeypatch: pytest.MonkeyPatch
) -> None:
    held, net = STRANGE[kind](), narrow()
    holder = SimpleNamespace(held=held, calls=0)

    def of_a_cell(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model, batch) + 0 * (held is None)

    def of_a_global(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model, batch) + 0 * (BARE is None)

    def of_a_holder(model: nn.Module, batch: Any) -> Tensor:
        holder.calls += 1
        return cross_entropy(model, batch)

    monkeypatch.setitem(globals(), "BARE", held if where == "global" else None)
    if where == "model":
        net.__dict__["held"] = held
    loss = {"cell": of_a_cell, "global": of_a_global}.get(where, of_a_holder)
    ran = run(net, loss, steps=STEPS)
    assert ran.outcomes()
    assert holder.calls == (STEPS if where in ("holder", "model") else 0)


class Slots:
    """Has slots that a property stands before, and one whose name is its class's own."""

    __slots__ = ("__own", "shown")

    def __init__(self) -> None:
        self.__own, self.shown = 1, [1]

    def bump(self) -> None:
        """Change all."""
        self.__own += 1
        self.shown = [*self.shown, 2]

    def told(self) -> object:
        """Return all."""
        return self.__own, self.shown


class Hidden(Slots):
    """Its slot cannot be read as an attribute."""

    @property
    def own(self) -> int:
        """Raise."""
        raise ValueError("hidden")


class Base:
    """Methods by one another."""

    seen: ClassVar[list[int]] = []
    latest = 0

    def loss(self) -> None:
        """Go on."""
        self.first()

    def first(self) -> None:
        """Go on."""
        type(self).second()

    @classmethod
    def second(cls) -> None:
        """Write to the class."""
        cls.seen.append(1)
        Base.latest += 1

    lines: ClassVar[Any] = lambda self: self.seen.append(2)


def around(function: Any) -> Surroundings:
    return Surroundings(function, narrow())


def test_slots_are_put_back_whatever_their_names() -> None:
    slots, hidden = Slots(), Hidden()

    def loss() -> None:
        slots.bump()
        hidden.bump()

    with around(loss).same():
        loss()
    assert slots.told() == hidden.told() == (1, [1])


@pytest.mark.parametrize("method", ["loss", "lines", "second"])
def test_methods_reach_their_class_and_one_another(method: str) -> None:
    function = getattr(Base(), method)
    with around(function).same():
        function()
    assert (Base.seen, Base.latest) == ([], 0)


def test_orders_and_views_are_put_back() -> None:
    ordered, long = OrderedDict(a=1, b=2), OrderedDict((str(i), i) for i in range(3000))
    chain: ChainMap[str, int] = ChainMap({}, {"a": 1})
    row = array("d", [1.0])

    def loss() -> None:
        ordered.move_to_end("a")
        long["new"] = 1
        chain["b"] = 2
        row.append(2.0)

    with around(loss).same():
        loss()
    assert list(ordered) == ["a", "b"]
    assert len(long) == len(list(long)) == 3000
    assert (dict(chain), list(row)) == ({"a": 1}, [1.0])


@pytest.mark.parametrize("size", [4, 5000])
def test_tensors_whose_numbers_are_exchanged_get_their_own_back(size: int) -> None:
    given, sized = torch.zeros(size), torch.zeros(size)
    view = given[:2]

    def loss() -> None:
        given.data = torch.ones(7)
        sized.resize_(2 * size)

    known = around(loss)
    with known.same():
        loss()
    given[0] = 5
    assert view[0] == 5  # of the same numbers
    assert given[1:].eq(0).all()
    assert sized.shape == (size,)


def test_long_sets_are_told_not_copied() -> None:
    long = set(range(100_000))
    ends = deque(range(100_000), maxlen=100_000)

    def loss() -> None:
        long.add(-1)
        ends.append(-1)

    known = around(loss)
    with known.same():
        pass
    assert known.lost == {}
    with known.same():
        loss()
    assert set(known.lost) == {"a deque of 100000", "a set of 100000"}


def test_no_entry_is_missing_while_a_dict_is_put_back() -> None:
    """Another thread may read an object at any moment."""
    held = SimpleNamespace(calls=0, lock="lock")
    read: list[object] = []

    class Watching:
        """Reads when it is let go of."""

        def __del__(self) -> None:
            read.append(held.__dict__.get("lock"))

    def loss() -> None:
        held.calls += 1
        held.new = Watching()

    with around(loss).same():
        loss()
    assert read == ["lock"]
    assert vars(held) == {"calls": 0, "lock": "lock"}


@pytest.mark.parametrize("mode", ["early", "incubate"])
def test_a_pass_in_inference_mode_is_no_error_of_ours(mode: str) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.inference_mode():
            model(batch[0])
        return cross_entropy(model, batch)

    if mode == "early":
        assert run(narrow(), loss, steps=STEPS, growth=mode).outcomes()
    else:
        with pytest.raises(esper.SiteError, match="is called 2 times in a pass"):
            run(narrow(), loss, steps=STEPS, growth=mode)
