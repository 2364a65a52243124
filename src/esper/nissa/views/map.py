"""The map of a model as one SVG string: its layers, what grew between them, and where nothing can."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from html import escape

from esper.nissa.run.facts import SiteFacts
from esper.nissa.run.history import DecisionHistory, RunHistory
from esper.nissa.views.palette import GREEN, GREY
from esper.printable import counted, printable

WIDTH = 860
BOX, GAP, LINE = (
    34,
    78,
    18,
)  # height of a layer, room for what stands between two, height of a text line (pixels)
LEFT, BAR_LEFT, BAR = 24, 380, 300  # left edge of the layers, left edge and full length of the bars


def model_map(history: RunHistory) -> str:
    """Draw a run's model: boxes for layers, bars for widths, marks for seeds, refused places.

    All bars share one scale, grey as given and green as grown. A green mark is a seed that was kept, a hollow
    one a seed that was refused, a grey one is still being judged.
    """
    parts: list[str] = []
    y, previous = 10, None
    widths = history.widths
    scale = BAR / max([after for _, after in widths.values()] or [1])
    sites = history.started.get("sites", ())
    for site in sites:
        if "+" in site["name"]:
            continue
        producer, _, consumer = site["name"].partition(">")
        if producer != previous:
            y += 14 if previous else 0
            parts.append(_layer(producer, y))
            y += BOX
        parts.extend(_between(history, site, y, scale))
        y += GAP
        parts.append(_layer(consumer, y))
        y, previous = y + BOX, consumer
    y += 14 if previous else 0
    for place in tried_places(history):
        parts.append(_layer(place, y))
        y += BOX
        for site in sites:
            if site["name"].startswith(f"{place}+") and _tried(history, site["name"]):
                parts.extend(_between(history, site, y, scale))
                y += GAP
    if offers := sum("+" in site["name"] for site in sites):
        places = len({site["name"].partition("+")[0] for site in sites if "+" in site["name"]})
        text = (
            f"{offers} {'offer' if offers == 1 else 'offers'} of branches and blocks at {places} "
            f"{'place' if places == 1 else 'places'}; those that were tried are drawn"
        )
        parts.append(_text(LEFT, y + 24, text, faint=True))
        y += 26
    y += 22
    for refusal in history.refused:
        lines = textwrap.wrap(refusal.reason, 92) or [""]
        height = 14 + LINE * (1 + len(lines))
        parts.append(
            f'<rect x="{LEFT}" y="{y}" width="{WIDTH - 2 * LEFT}" height="{height}" rx="8" fill="none" '
            f'stroke="{GREY}" stroke-dasharray="5 4"/>'
        )
        parts.append(_text(LEFT + 14, y + 22, f"{refusal.place}: nothing grows here", weight=600))
        parts.extend(
            _text(LEFT + 14, y + 22 + LINE * (i + 1), line, faint=True) for i, line in enumerate(lines)
        )
        y += height + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 4}" role="img" '
        'font-family="system-ui, sans-serif" font-size="14" fill="currentColor">'
        f"<title>Map of the model: its layers and what grew between them</title>{''.join(parts)}</svg>"
    )


def tried_places(history: RunHistory) -> list[str]:
    """List the places at which a blueprint was tried, in the model's order."""
    names = [site["name"] for site in history.started.get("sites", ()) if "+" in site["name"]]
    return list(dict.fromkeys(name.partition("+")[0] for name in names if _tried(history, name)))


def _tried(history: RunHistory, site: str) -> list[DecisionHistory]:
    return [decision for decision in history.decisions.values() if decision.site == site]


def _layer(name: str, y: int) -> str:
    return (
        f'<rect x="{LEFT}" y="{y}" width="190" height="{BOX}" rx="8" fill="none" stroke="currentColor" '
        f'stroke-width="1.5"/>{_text(LEFT + 14, y + 22, name, weight=600)}'
    )


def _between(history: RunHistory, site: SiteFacts, y: int, scale: float) -> Iterator[str]:
    """Draw what joins a producer to its consumer: operations, units before and after, seeds."""
    before, after = history.widths[site["name"]]
    middle = LEFT + 95
    yield f'<path d="M{middle} {y}V{y + GAP}" stroke="currentColor" stroke-width="1.5"/>'
    operations = " · ".join(site["between"]) or site.get("blueprint", "")
    yield _text(
        middle + 12, y + 44, operations if len(operations) <= 36 else operations[:35] + "…", faint=True
    )
    yield _bar(BAR_LEFT, y + 16, before * scale, GREY)
    if after > before:
        yield _bar(BAR_LEFT + before * scale, y + 16, (after - before) * scale, GREEN)
    label = (f"{before} → " if after > before else "") + counted(site["name"], after)
    yield _text(BAR_LEFT + after * scale + 12, y + 30, label, weight=600)
    tried = _tried(history, site["name"])
    for index, decision in enumerate(tried):
        x = BAR_LEFT + 7 + 20 * index
        fill = {True: GREEN, False: "none", None: GREY}[decision.kept]
        stroke = GREEN if decision.kept else GREY
        yield f'<circle cx="{x}" cy="{y + 52}" r="6" fill="{fill}" stroke="{stroke}" stroke-width="1.8">'
        yield f"<title>decision {decision.id}: {escape(decision.verdict)}</title></circle>"
    counts = {
        verdict: sum(decision.verdict == verdict for decision in tried)
        for verdict in ("kept", "taken back", "refused", "open")
    }
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count) or "no seed tried"
    yield _text(BAR_LEFT + 20 * len(tried) + (6 if tried else 0), y + 57, told, faint=True)


def _bar(x: float, y: int, length: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y}" width="{max(length, 2):.1f}" height="18" rx="2" fill="{colour}"/>'


def _text(x: float, y: int, text: str, *, weight: int = 400, faint: bool = False) -> str:
    dim = ' opacity="0.72" font-size="13"' if faint else ""
    return f'<text x="{x:.1f}" y="{y}" font-weight="{weight}"{dim}>{escape(printable(text, keep=""))}</text>'
