"""A layer that a pass calls several times: a place, if every call leads the same way to the same consumers.

Siamese and contrastive nets, two views of a consistency loss, the interior and the boundary of a physics
problem, a cell that is unrolled. A new unit is a row of the one layer and columns of the others, as ever;
what it does in a pass is the sum over its calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from esper.contracts import Site
from esper.kasmina.recording.recorder import Refused
from esper.kasmina.sites.finder import Finder
from esper.kasmina.widths.fork import Fork
from esper.kasmina.widths.gated import GatedPair
from esper.kasmina.widths.pairs import Pair
from esper.printable import times

View: TypeAlias = "Pair | Fork | GatedPair"


def joint(finder: Finder, views: Sequence[View]) -> View:
    """Return the place that one layer's calls make together.

    Args:
        finder: Finder that knows the calls.
        views: The place behind each of them, as if it were the only one.

    Raises:
        Refused: They differ; it is said where.
    """
    first, calls = views[0], finder.calls_of(views[0].site.entry)
    if len(calls) == 1:
        return first
    for number, view in enumerate(views[1:], 2):
        if bare(view) == bare(first):
            continue
        ways = described(first.site), described(view.site)
        differ = f"{ways[0]} at call 1, {ways[1]} at call {number}"
        if ways[0] == ways[1]:
            differ = f"{ways[0]} has other arguments at call {number} than at call 1"
        raise Refused(f"{first.site.entry} is called {times(len(calls))} in a pass, and not alike: {differ}")
    rows = [(call.shape or (1,))[0] for call in calls]
    shares = [one / (finder.examples or rows[0]) for one in rows]  # a batch of its own may have another size
    return summed(views, shares)


def bare(view: View) -> View:
    """Return a view without how often and at what cost it runs, which calls may differ in."""
    site = replace(view.site, unit_flops=0)
    if isinstance(view, Fork):
        branches = tuple(replace(branch, positions=0) for branch in view.branches)
        return replace(view, site=site, branches=branches, positions=0, step_flops=0)
    return replace(view, site=site, places=(0, 0), step_flops=0)


def summed(views: Sequence[View], shares: Sequence[float]) -> View:
    """Add up what the calls cost.

    Args:
        views: One for each call.
        shares: Rows of each call per example.
    """
    first = views[0]
    site = replace(first.site, calls=len(views))
    flops = round(total([view.step_flops for view in views], shares))
    if isinstance(first, Fork):
        forks = [view for view in views if isinstance(view, Fork)]
        branches = tuple(
            replace(branch, positions=total([fork.branches[index].positions for fork in forks], shares))
            for index, branch in enumerate(first.branches)
        )
        runs = total([fork.positions for fork in forks], shares)
        made = replace(first, site=site, branches=branches, positions=runs, step_flops=flops)
        return made.refreshed()
    pairs = [view for view in views if not isinstance(view, Fork)]
    before, behind = (total([pair.places[end] for pair in pairs], shares) for end in (0, 1))
    return replace(first, site=site, places=(before, behind), step_flops=flops).refreshed()


def total(counts: Sequence[float], shares: Sequence[float]) -> float:
    """Add up what is counted per row of each call."""
    return sum(count * share for count, share in zip(counts, shares, strict=True))


def described(site: Site) -> str:
    """Write a place's path."""
    return " → ".join((site.entry, *site.between, " + ".join(site.exits)))
