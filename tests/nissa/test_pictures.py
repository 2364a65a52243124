import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable

import pytest

from esper.contracts import Event
from esper.nissa.run.history import RunHistory, fold
from esper.nissa.views import charts
from esper.nissa.views.map import model_map

SVG = "{http://www.w3.org/2000/svg}"
PICTURES: dict[str, Callable[[RunHistory], str]] = {
    "learning": charts.learning,
    "parameters": charts.parameters,
    "lives": charts.lives,
    "map": model_map,
}


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ET.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_one_svg_that_loads_nothing_and_has_a_title(name: str, history: RunHistory) -> None:
    svg = PICTURES[name](history)
    root = ET.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert root.find(f"{SVG}title") is not None
    assert not re.search(r'(?:href|src)="(?!#)', svg)
    assert "currentColor" in svg
    assert PICTURES[name](history) == svg  # the same run, the same bytes


@pytest.mark.parametrize("name", PICTURES)
def test_a_run_that_has_only_begun_can_be_drawn(name: str, events: list[Event]) -> None:
    ET.fromstring(PICTURES[name](fold(events[:1])))


def test_growth_is_marked_where_it_happened(history: RunHistory, events: list[Event]) -> None:
    svg = charts.learning(history)
    assert {"+8 conv2>fc", "+4 conv1>conv2", "Training loss", "Held-out accuracy"} <= set(texts(svg))
    without = fold(event for event in events if event.kind != "widened")
    marks = svg.count(charts.GREEN.lower()) - charts.learning(without).count(charts.GREEN.lower())
    assert marks == 4  # two growths in two panels


@pytest.mark.parametrize("losses", [(1.9, 0.2), (2.3, 1e-4), (0.31, 0.3), (1.0, 1.0), (1.0, -0.5)])
def test_no_axis_speaks_in_code(losses: tuple[float, float]) -> None:
    rows = [
        {"loss": loss, "parameters": 1, "growth_flops": 0, "training_flops": 0, "seconds": 0}
        for loss in losses
    ]
    history = fold(Event("progress", step, row) for step, row in enumerate(rows))
    words = texts(charts.learning(history))
    assert not [word for word in words if "$" in word or "\\" in word]
    assert len([word for word in words if word.replace(".", "").replace("−", "").isdigit()]) > 3


def test_twins_are_drawn_beside_the_run_and_named(history: RunHistory) -> None:
    svg = charts.learning(history, {"no growth": history, "fixed $100 <b>": history})
    assert {"grown", "no growth", "fixed $100 <b>"} <= set(texts(svg))
    assert "no growth" in texts(charts.parameters(history, {"no growth": history}))


def test_another_metric_is_drawn_where_there_is_no_accuracy() -> None:
    history = fold([Event("epoch", 5, {"epoch": 1, "metrics": {"mse": 0.5}})])
    assert "Held-out mse" in texts(charts.learning(history))


def test_every_life_of_a_seed_has_a_row_and_every_stage_a_key(history: RunHistory) -> None:
    words = texts(charts.lives(history))
    assert {"conv2>fc at 90", "conv1>conv2 at 270", "conv1>conv2 at 480"} <= set(words)
    assert {"training", "grafting", "fossilised", "culled"} <= set(words)


def test_the_map_names_layers_widths_seeds_and_refusals(history: RunHistory) -> None:
    words = texts(model_map(history))
    assert [word for word in words if word in ("conv1", "conv2", "fc")] == ["conv1", "conv2", "fc"]
    assert {"4 → 8 units", "8 → 16 units", "1 kept, 1 refused", "1 kept", "fc: nothing grows here"} <= set(
        words
    )
    marks = [node.get("fill") for node in ET.fromstring(model_map(history)).iter(f"{SVG}circle")]
    assert sorted(marks) == ["#009E73", "#009E73", "none"]


LONG = "encoder.layers.0.linear1>encoder.layers.0.linear2"


@pytest.mark.parametrize(
    ("sites", "said"),
    [
        ([LONG], "+8 …coder.layers.0.linear2"),
        ([LONG, "a>b"], "+16 at 2 places"),
        (["a>b", "b>c"], "+8 a>b, +8 b>c"),
    ],
)
def test_long_names_leave_the_picture_its_room(sites: list[str], said: str) -> None:
    chosen = {"action": "widen", "width": 8, "start": None, "reason": "", "arms": [], "propensity": 1.0}
    facts = {"difference": 0.0, "parameters": 70, "milliseconds": 2.0, "units": 8, "edits": []}
    events = []
    for number, site in enumerate(sites, start=1):
        of = {"decision": number, "site": site}
        events += [
            Event("decision", 8, {**of, **chosen, "predicted": None}),
            Event("widened", 8, {**of, **facts}),
        ]
    assert [text for text in texts(charts.learning(fold(events))) if text.startswith("+")] == [said]
    assert len(said) <= charts.UPRIGHT


def test_the_model_itself_has_a_name_where_it_cannot_grow(events: list[Event]) -> None:
    started = Event("run_started", 0, {**events[0].data, "refused": [["", "it has pos"]]})
    assert "the model: nothing grows here" in texts(model_map(fold([started])))


def test_without_matplotlib_the_error_is_its_pip_line() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from esper.errors import MissingExtraError\n"
        "try: import esper.nissa.views.charts\n"
        "except MissingExtraError as error: print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'esper-morph[report]'" in ran.stdout
