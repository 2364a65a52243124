"""Is a compiled kernel faster than eager, forward and backward; what does auto choose, and what is gained?"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from rich.table import Table

from benchmarks import compare, harness, machine
from benchmarks.promises import Promise
from esper.blueprints import CATALOGUE
from esper.blueprints.kernel import initial_weights
from esper.blueprints.program import Form, Program
from esper.contracts import Signature
from esper.errors import CompileError
from esper.tezzeret.build import pipeline
from esper.tezzeret.characterise import MARGIN, characterise, fastest
from esper.tezzeret.verify import example_input, moved_weight, verify

NAME = "kernels"
REPEATS = 3  # measurements; what auto chooses in one is judged by the next
ARMS = ("eager", "torchscript", "export", "inductor", "aoti")
USUAL = ("eager", "torchscript", "export")  # the others compile for seconds: ask for them by --arms
AGAIN = "eager again"  # the noise of this table: the same form under another name
HIDDEN = 16
BUDGET = 1.0  # seconds per measurement, over all forms
PLACES: dict[str, tuple[Signature, tuple[int, ...]]] = {
    "vector": (Signature("vector", "parallel", 64, 64), (64, 64)),
    "sequence": (Signature("sequence", "parallel", 64, 64), (8, 32, 64)),
    "image": (Signature("image", "parallel", 32, 32), (16, 32, 16, 16)),
    "image, 3×3 /2": (
        Signature("image", "parallel", 32, 32, (3, 3), (2, 2), (1, 1), (1, 1)),
        (16, 32, 16, 16),
    ),
}


@dataclass
class Subject:
    """One blueprint at one place: what was compiled, what was wrong, what was measured."""

    blueprint: str
    place: str
    parameters: int
    eager_ms: float | None = None
    speedups: dict[str, list[float]] = field(default_factory=dict)  # by arm, one per measurement
    forward: dict[str, float] = field(default_factory=dict)  # speed-up of inference, for what cannot train
    wrong: dict[str, str] = field(default_factory=dict)  # by arm: it does not compile, or is not the program
    chosen: list[str] = field(default_factory=list)  # by auto, one per measurement
    gained: list[float] = field(default_factory=list)  # its speed-up, each in the next measurement


def main(argv: Sequence[str]) -> int:
    """Compile, verify and time every blueprint at typical sizes."""
    chosen = harness.options(NAME, __doc__, argv, seeds=REPEATS, arms=ARMS)
    torch.set_num_threads(machine.THREADS_PER_WORKER)
    arms = [arm for arm in ARMS if arm == "eager" or arm in (chosen.arms or USUAL)]
    usable = [arm for arm in arms if pipeline(arm).unavailable() is None]
    names = CATALOGUE.names()[:2] if chosen.quick else CATALOGUE.names()
    budget = 0.01 if chosen.quick else BUDGET
    subjects = [
        subject(name, place, usable, chosen.seeds, budget)
        for name in names
        for place in PLACES
        if CATALOGUE.get(name).misfit(PLACES[place][0]) is None
    ]
    wrong = sum(len(one.wrong) for one in subjects)
    judged = [Promise("compiled forms that are wrong or do not compile", wrong, "<=", 0, digits=0)]
    shown = [
        speed_table(subjects, [arm for arm in usable if arm != "eager"]),
        summary_table(subjects, usable),
    ]
    figures = {
        "unavailable": {arm: pipeline(arm).unavailable() for arm in arms if arm not in usable},
        "margin": MARGIN,
        "shapes": {place: list(shape) for place, (_, shape) in PLACES.items()},
        "subjects": [vars(one) for one in subjects],
    }
    return harness.conclude(NAME, chosen, shown, judged, figures)


def subject(name: str, place: str, arms: Sequence[str], repeats: int, budget: float) -> Subject:
    """Measure one blueprint at one place."""
    signature, shape = PLACES[place]
    program = CATALOGUE.get(name).lower(signature, HIDDEN)
    example = example_input(signature, shape)
    found = Subject(name, place, program.parameter_count())
    forms = compiled(found, program, example, arms)
    stream = torch.Generator().manual_seed(0)
    start = initial_weights(program, 0)
    weights = [moved_weight(weight, start[weight.name], stream) for weight in program.weights]
    training = {arm: form for arm, form in forms.items() if pipeline(arm).trains}
    # Turns keep their neighbours, and right after eager the same code is 2 % faster: another form between.
    turns = dict([*list(training.items())[:2], (AGAIN, program.run), *list(training.items())[2:]])
    eager = []
    for _ in range(repeats):
        figures = characterise(turns, weights, example, budget)
        for arm, one in figures.items():
            found.speedups.setdefault(arm, []).append(one.speedup)
        eager.append(figures["eager"].milliseconds)
        found.chosen.append(fastest({arm: figures[arm] for arm in training}))
    found.eager_ms = statistics.median(eager)
    found.gained = [found.speedups[arm][(index + 1) % repeats] for index, arm in enumerate(found.chosen)]
    for arm, form in forms.items():
        if arm not in training:
            found.forward[arm] = inference(program.run, form, weights, example, budget)
    return found


def compiled(found: Subject, program: Program, example: torch.Tensor, arms: Sequence[str]) -> dict[str, Form]:
    """Compile and verify; note what is wrong."""
    forms: dict[str, Form] = {}
    for arm in arms:
        made = pipeline(arm)
        try:
            form = made.compile(program, example)
            verify(program, initial_weights(program, 0), form, example, trains=made.trains)
        except CompileError as error:
            found.wrong[arm] = str(error)
        else:
            forms[arm] = form
    return forms


def inference(
    eager: Form, form: Form, weights: Sequence[torch.Tensor], example: torch.Tensor, budget: float
) -> float:
    """Return a form's speed-up over eager without gradients, median of ratios of calls in turns."""
    ratios: list[float] = []
    end = time.perf_counter() + budget
    with torch.no_grad():
        while len(ratios) < 5 or time.perf_counter() < end:
            seconds = []
            for one in (eager, form):
                start = time.perf_counter()
                one(example, weights)
                seconds.append(time.perf_counter() - start)
            ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def speed_table(subjects: Sequence[Subject], arms: Sequence[str]) -> Table:
    """Show each form's speed-up over eager."""
    title = f"Forward + backward: times as fast as eager, median (least–most); hidden {HIDDEN}"
    columns = ["blueprint", "place", "eager ms", AGAIN, *arms, "auto chose", "and gained"]
    table = compare.titled(title, columns)
    for one in subjects:
        cells = [cell(one, arm) for arm in (AGAIN, *arms)]
        choice = ", ".join(f"{arm} {n}×" for arm, n in Counter(one.chosen).most_common())
        gain = f"{statistics.median(one.gained) - 1:+.1%}"
        table.add_row(one.blueprint, one.place, f"{one.eager_ms:.3f}", *cells, choice, gain)
    return table


def cell(one: Subject, arm: str) -> str:
    if arm in one.wrong:
        return "[red]wrong[/]"
    if arm in one.forward:
        return f"forward only {one.forward[arm]:.2f}"
    values = one.speedups[arm]
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def summary_table(subjects: Sequence[Subject], arms: Sequence[str]) -> Table:
    """Show each form over all blueprints; eager against itself is the noise."""
    columns = ["form", "median", "least", "most", f"at least {MARGIN:.2f} in every measurement"]
    table = compare.titled(f"Over {len(subjects)} blueprints and places: times as fast as eager", columns)
    trained: Mapping[str, list[list[float]]] = {
        arm: [one.speedups[arm] for one in subjects if arm in one.speedups]
        for arm in (AGAIN, *(arm for arm in arms if arm != "eager"))
    }
    for arm, runs in trained.items():
        middles = [statistics.median(values) for values in runs]
        if middles:
            faster = sum(min(values) >= MARGIN for values in runs)
            figures = (statistics.median(middles), min(middles), max(middles))
            table.add_row(arm, *(f"{value:.3f}" for value in figures), f"{faster} of {len(runs)}")
    gains = [statistics.median(one.gained) for one in subjects]
    figures = (statistics.median(gains), min(gains), max(gains))
    table.add_row("what auto chose", *(f"{value:.3f}" for value in figures), "")
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
