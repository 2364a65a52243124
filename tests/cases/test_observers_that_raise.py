"""What an ``on_event`` raises is the user's own: it comes through with a note, and costs the run nothing."""

from __future__ import annotations

import copy
from contextlib import suppress

import pytest
import torch

import esper
from esper.contracts import Event
from tests.cases.loops import Task, cross_entropy, narrow

STEPS = 60


class Upset:
    """Raises at every event of a kind, if told to."""

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.armed = False

    def __call__(self, event: Event) -> None:
        """Note an event, or raise."""
        self.kinds.append(event.kind)
        if self.armed and event.kind != "step":
            raise KeyError(event.kind)


def test_one_that_takes_no_event_is_named_at_the_door_and_nothing_has_begun() -> None:
    net, draw = narrow(), Task()
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    with pytest.raises(TypeError, match="len") as told:
        esper.grow(net, optimizer, cross_entropy, probe=[draw(256)], steps=STEPS, on_event=len)  # type: ignore[arg-type]
    assert any(note.startswith("raised by on_event: it was told") for note in told.value.__notes__)
    assert all(torch.equal(one, before[name]) for name, one in net.state_dict().items())
    esper.grow(net, optimizer, cross_entropy, probe=[draw(256)], steps=STEPS).finish()


@pytest.mark.parametrize("growth", ["early", "incubate"])
def test_a_loop_that_catches_what_its_observer_raises_trains_on_and_grows_the_same(growth: str) -> None:
    def grown(upset: Upset, armed: bool) -> tuple[dict[str, torch.Tensor], list[str]]:
        net, draw = narrow(), Task()
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        run = esper.grow(
            net, optimizer, cross_entropy, probe=[draw(256)], steps=STEPS, growth=growth, on_event=upset
        )
        upset.armed = armed
        for _ in range(STEPS):
            batch = draw()
            optimizer.zero_grad()
            loss = cross_entropy(net, batch)
            loss.backward()
            optimizer.step()
            with suppress(KeyError):
                run.step(batch, loss)
        if armed:
            with pytest.raises(KeyError) as told:
                run.finish()
            assert told.value.__notes__[0].startswith(
                f"raised by on_event: it was told {told.value.args[0]!r}"
            )
        else:
            run.finish()
        return net.state_dict(), upset.kinds

    weights, kinds = grown(Upset(), armed=False)
    others, told = grown(Upset(), armed=True)
    assert told == kinds
    assert len(kinds) > 3
    assert weights.keys() == others.keys()
    assert all(torch.equal(one, others[name]) for name, one in weights.items())
