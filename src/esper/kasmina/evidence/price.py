"""What a look will cost at most, before it is taken; see ``Score`` for what it does."""

from __future__ import annotations

from collections.abc import Mapping

from esper.kasmina.evidence.score import pool_size
from esper.kasmina.widths.places import Place, WidenPlace


def look_price(
    places: Mapping[str, Place], units: Mapping[str, int], trained: int, held: int, inner: bool
) -> int:
    """Return the FLOPs of a look beyond the host's own passes.

    Args:
        places: Places, by name.
        units: Numbers of units to test, by name.
        trained: Training examples.
        held: Held-out examples.
        inner: True where the loss takes gradients inside itself.
    """
    total = 0
    for name, count in units.items():
        place = places[name]
        each = place.site.unit_flops
        total += 2 * count * each * held
        if not isinstance(place, WidenPlace):
            total += 3 * count * each * trained
            continue
        pool, own = pool_size(place, count), place.site.width + 1
        total += int((1.5 * pool + own) * (3 if inner else 1) * each * trained)
        positions = max([*place.used().values(), 1.0]) * place.site.calls
        for outlet in place.outlets:
            rows = int(trained * positions * outlet.columns)
            total += 2 * rows * (own * own + own * pool + pool * pool) + own * own * (own + 2 * pool)
    return total
