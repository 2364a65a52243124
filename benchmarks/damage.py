"""Is every flip, cut and swap in what Esper keeps refused, and is an older checkpoint found at once?"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from benchmarks import compare, harness
from benchmarks.artefacts import Artefact, artefacts
from benchmarks.promises import Promise
from esper.checkpoint import CheckpointManager, FolderStorage, Run
from esper.checkpoint.format.manifest import MANIFEST, PARTS
from esper.checkpoint.format.reader import newest

NAME = "damage"
SEEDS, CASES = 10, 1000  # a thousand cases for each seed
WIDE = 3160  # a square layer of 10 M parameters
MOVED = "another under its name"
Change = dict[str, bytes | None]  # what lies in a part's place; None: nothing


def flip(draw: random.Random, artefact: Artefact) -> Change:
    """Turn one bit of one part."""
    part = draw.choice([name for name, content in artefact.parts.items() if content])
    return {part: flipped(artefact.parts[part], draw.randrange(8 * len(artefact.parts[part])))}


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def cut(draw: random.Random, artefact: Artefact) -> Change:
    """Leave the beginning of one part; every fourth time nothing of it, or all but a byte."""
    part, content = draw.choice(list(artefact.parts.items()))
    length = draw.choice((0, len(content) - 1)) if draw.random() < 0.25 else draw.randrange(len(content))
    return {part: content[:length]}


def grow(draw: random.Random, artefact: Artefact) -> Change:
    """Append bytes to one part: any, zeros, a line's end, or the part once more."""
    part, content = draw.choice(list(artefact.parts.items()))
    return {part: content + draw.choice((draw.randbytes(draw.randint(1, 64)), b"\0", b"\n", content))}


def exchange(draw: random.Random, artefact: Artefact) -> Change:
    """Swap two parts."""
    one, two = draw.sample(list(artefact.parts), 2)
    return {one: artefact.parts[two], two: artefact.parts[one]}


def double(draw: random.Random, artefact: Artefact) -> Change:
    """Put a copy of one part in another's place."""
    one, two = draw.sample(list(artefact.parts), 2)
    return {one: artefact.parts[two]}


def foreign(draw: random.Random, artefact: Artefact) -> Change:
    """Put the same part of another sound artefact in one's place: of another step, or of another run."""
    other = draw.choice(artefact.others)
    part = draw.choice(list(artefact.parts))
    return {part: other[part]}


def moved(draw: random.Random, artefact: Artefact) -> Change:
    """Put another sound artefact as a whole under this one's name."""
    return dict(draw.choice(artefact.strangers))


def lose(draw: random.Random, artefact: Artefact) -> Change:
    """Take one part away."""
    return {draw.choice(list(artefact.parts)): None}


DAMAGES: dict[str, Callable[[random.Random, Artefact], Change]] = {
    "one bit flipped": flip,
    "cut": cut,
    "bytes appended": grow,
    "two parts swapped": exchange,
    "a part twice": double,
    "a part of another": foreign,
    MOVED: moved,
    "a part missing": lose,
}


@dataclass
class Tally:
    """What came of the cases, by artefact and kind of damage."""

    cases: Counter[tuple[str, str]] = field(default_factory=Counter)
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)
    back: defaultdict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    passed: list[str] = field(default_factory=list)


def main(argv: Sequence[str]) -> int:
    """Damage every kind of artefact at random; then time the way back past a damaged large checkpoint."""
    chosen = harness.options(NAME, __doc__, argv, seeds=SEEDS)
    folder = Path(tempfile.mkdtemp(prefix="esper-damage-"))
    try:
        kept = artefacts(folder)
        tally = Tally()
        for seed in range(chosen.seeds):
            inflict(kept, seed, CASES // 10 if chosen.quick else CASES, tally)
        large = steps_back(folder / "large", 64 if chosen.quick else WIDE)
    finally:
        shutil.rmtree(folder)
    return report(chosen, tally, large)


def inflict(kept: Sequence[Artefact], seed: int, cases: int, tally: Tally) -> None:
    """Draw cases, every kind of damage to every artefact in turn; each is undone before the next."""
    draw = random.Random(seed)
    pairs = [(one, name) for one in kept for name in DAMAGES if one.strangers or name != MOVED]
    for case in range(cases):
        artefact, name = pairs[case % len(pairs)]
        change: Change = {}
        while not change:  # what happens to be the same bytes is no damage
            drawn = DAMAGES[name](draw, artefact)
            change = {part: new for part, new in drawn.items() if new != artefact.parts[part]}
        for part, content in change.items():
            artefact.place(part, content)
        begun = time.perf_counter()
        why = artefact.accepted()
        key = artefact.name, name
        tally.back[key] = max(tally.back[key], time.perf_counter() - begun)
        tally.cases[key] += 1
        tally.refused[key] += why is None
        if why is not None:
            tally.passed.append(f"seed {seed}, case {case}: {artefact.name}, {name}, {list(change)}: {why}")
        for part in change:
            artefact.place(part, artefact.parts[part])
    for artefact in kept:  # or everything was refused because nothing is ever accepted
        assert artefact.accepted() is not None, f"{artefact.name} is refused without damage"


def steps_back(folder: Path, wide: int) -> dict[str, float]:
    """Damage the newer of two checkpoints with Adam; return the seconds to the older one, by damage."""
    net = nn.Linear(wide, wide)
    optimizer = torch.optim.Adam(net.parameters())
    with CheckpointManager(folder, Run(net, optimizer), every=10**9) as manager:
        for _ in range(2):
            optimizer.zero_grad()
            net(torch.randn(2, wide)).square().mean().backward()
            optimizer.step()
            manager.save(wait=True)
    del net, optimizer, manager
    storage = FolderStorage(folder)
    older, newer = storage.names()
    seconds: dict[str, float] = {}
    for part in (*PARTS, MANIFEST):
        path = folder / newer / part
        content = path.read_bytes()
        harms = {"last bit flipped": flipped(content, 8 * len(content) - 1), "last byte cut": content[:-1]}
        for name, harm in harms.items():
            path.write_bytes(harm)
            begun = time.perf_counter()
            found = newest(storage, lambda line: None)
            seconds[f"{part}, {name}"] = time.perf_counter() - begun
            assert found is not None, "no checkpoint was found"
            assert found.manifest.name == older, f"{found.manifest.name} was found"
            del found
        path.write_bytes(content)
    return seconds


def report(chosen: harness.Options, tally: Tally, large: dict[str, float]) -> int:
    """Print refused of all cases, and the longest any of them took."""
    columns = ["", *DAMAGES]
    shown = compare.titled("Refused of all cases, and the worst in ms", columns)
    for kind in dict.fromkeys(kind for kind, _ in tally.cases):
        cells = [(kind, name) for name in DAMAGES]
        shown.add_row(
            kind,
            *(
                f"{tally.refused[c]}/{tally.cases[c]}  {1e3 * tally.back[c]:.0f}" if tally.cases[c] else "–"
                for c in cells
            ),
        )
    wide = compare.titled("10 M parameters with Adam, 120 MB: s to the older checkpoint", ["", "s"])
    for name, value in large.items():
        wide.add_row(name, f"{value:.3f}")
    cases, refused = tally.cases.total(), tally.refused.total()
    small = max(worst for (kind, _), worst in tally.back.items() if kind.startswith("checkpoint"))
    judged = [
        Promise("flips, cuts and swaps", cases, ">=", 10_000, digits=0),
        Promise("refused", refused / cases, ">=", 1.0),
        Promise("small checkpoints: worst s to the older one", small, "<=", 2.0),
        Promise("10 M parameters: worst s to the older one", max(large.values()), "<=", 2.0),
    ]
    table = [
        {
            "artefact": kind,
            "damage": name,
            "cases": count,
            "refused": tally.refused[kind, name],
            "worst_seconds": tally.back[kind, name],
        }
        for (kind, name), count in tally.cases.items()
    ]
    figures = {"table": table, "large": large, "passed": tally.passed}
    return harness.conclude(NAME, chosen, [shown, wide, *tally.passed[:20]], judged, figures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
