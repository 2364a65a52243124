"""What a manifest and a state must hold, value by value: each is taken, and none of another kind."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from esper.checkpoint.format.checking import require_facts, require_genome, require_state
from esper.checkpoint.format.reader import read
from esper.errors import CheckpointError
from esper.storage.protocol import MemoryStorage
from tests.checkpoint.test_format import NAMES, golden

STEP = 63
GONE = object()
LATEST = 253402300799.0  # the last second of the year 9999
SHARD = {"name": "shard-0", "size": 1, "sha256": "0" * 64}
FACTS = {"step": 1, "time": 1.5, "code": {"esper": "0.1"}, "metrics": {"loss": 0.5}, "summary": {}}
Path = tuple[str, ...]


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    storage: MemoryStorage = golden()
    return read(storage, NAMES[1]).state


def changed(given: Any, path: Path, value: Any) -> Any:
    given = copy.deepcopy(given)
    inner = given
    for key in path[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return given


COUNTED = [-1, 1.0, True, None, "1"]
NO_MAPPING = [None, [], "x"]
ODD_FACTS: list[tuple[Path, list[Any]]] = [
    (("step",), [*COUNTED, GONE]),
    (("time",), [-1, LATEST + 1, float("nan"), True, None, "now", GONE]),
    (("code",), [*NO_MAPPING, {"esper": 1}]),
    (
        ("metrics",),
        [*NO_MAPPING, {"loss": float("inf")}, {"loss": True}, {"loss": 1e300}, {"loss": -(10**400)}],
    ),
    (("summary",), NO_MAPPING),
    (("summary", "model"), [1]),
    (("summary", "parameters"), COUNTED),
    (("summary", "grown"), COUNTED),
    (("summary", "awake"), ["x", [1]]),
    (("summary", "epoch"), [-1, "1"]),
    (("summary", "batch"), [-1, "1"]),
    (("summary", "run"), [1]),
    (("summary", "config"), [1]),
    (("summary", "shards"), [{}, [1], [{**SHARD, "name": 1}], [{**SHARD, "size": -1}]]),
    (
        ("summary", "shards"),
        [[{**SHARD, "sha256": "0" * n}] for n in (63, 65)] + [[{**SHARD, "sha256": 64 * [0]}]],
    ),
]
SOUND_FACTS: list[tuple[Path, list[Any]]] = [
    (("step",), [0]),
    (("time",), [0, LATEST]),
    (("code",), [{}]),
    (("metrics",), [{}, {"loss": None}, {"loss": -9.9e299}, {"loss": 0}]),
    (("summary", "epoch"), [None, 0]),
    (("summary", "batch"), [None, 0]),
    (("summary", "run"), [None, "beef"]),
    (("summary", "shards"), [[], [SHARD, SHARD]]),
]


@pytest.mark.parametrize(("path", "values"), ODD_FACTS)
def test_a_fact_of_another_kind_is_named(path: Path, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(CheckpointError, match=f"it: the manifest's {path[0]} is not of its kind"):
            require_facts(changed(FACTS, path, value), "it")


def test_facts_of_their_kind_are_taken() -> None:
    require_facts(FACTS, "it")
    for path, values in SOUND_FACTS:
        for value in values:
            require_facts(changed(FACTS, path, value), "it")


MODULE = {"state": {}, "buffers": {}, "frozen": []}
OPTIMIZER = {"kind": "SGD", "groups": [], "state": {}}
ODD_STATES: list[tuple[Path, list[Any]]] = [
    (("steps",), [*COUNTED, GONE]),
    (("config",), [GONE]),
    (("growth_config",), [[], "x", GONE]),
    (("growth",), [[], {}, {"version": 2}, {"version": 3}, {"version": -1}, {"version": None}, GONE]),
    (("growth", "sites"), [*NO_MAPPING, {"a": -1}, {1: 1}, GONE]),
    (("growth", "plans"), [{}, GONE]),
    (("growth", "layout"), [[], {"a": 1.0}, GONE]),
    (("growth", "tamiyo"), [[], GONE]),
    (("growth", "streams"), [[], GONE]),
    (("growth", "cost"), [[], GONE]),
    (("growth", "looks"), [*COUNTED, GONE]),
    (("growth", "counters"), [None, {}, [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, -1], (1, 2, 3, 4), GONE]),
    (("growth", "losses"), [None, (1.0,), [1], [1.0, None], GONE]),
    (("growth", "cool_until"), [None, True, 1.0, GONE]),
    (("growth", "pending"), [{}, GONE]),
    (("growth", "batches"), [{}, GONE]),
    (("growth", "trial"), [[], GONE]),
    (("modules",), [*NO_MAPPING, {}, {"other": MODULE}, {"": MODULE, "x": 1}, {"": MODULE, 1: MODULE}, GONE]),
    (("modules", ""), [changed(MODULE, (key,), odd) for key in MODULE for odd in (GONE, "x", 1)]),
    (("modules", "", "frozen"), [[1], ("weight",)]),
    (("modules", "", "state"), [{1: 1}]),
    (("optimizers",), [*NO_MAPPING, {}, {"a": 1}, GONE]),
    (
        ("optimizers", "optimizer"),
        [changed(OPTIMIZER, (key,), odd) for key in OPTIMIZER for odd in (GONE, 1)],
    ),
    (("optimizers", "optimizer", "state"), [{"weight": 1}, {1: {}}]),
    (("optimizers", "optimizer", "groups"), [{}, [1], [{}], [{"names": []}], [{"settings": {}}]]),
    (
        ("optimizers", "optimizer", "groups"),
        [
            [{"names": ["a"], "settings": []}],
            [{"names": [1], "settings": {}}],
            [{"names": "a", "settings": {}}],
        ],
    ),
    (("others",), [*NO_MAPPING, {1: 1}, GONE]),
    (("batches",), [[], {}, GONE]),
    (("batches", "epoch"), [*COUNTED, GONE]),
    (("batches", "index"), [*COUNTED, GONE]),
    (("batches", "length"), [-1, "x"]),
    (("batches", "began"), [None, GONE, [], {}]),  # of an epoch that has begun
    (("batches", "began", "python"), [None, (1, 2)]),
    (("randomness",), [*NO_MAPPING, GONE]),
]
SOUND_STATES: list[tuple[Path, list[Any]]] = [
    (("config",), [None, "x", {}]),
    (("growth_config",), [None, {}]),
    (("growth",), [None, {"version": 0}, {"version": 4}]),  # growth itself says which it reads
    (("growth", "trial"), [None, {}]),
    (("growth", "losses"), [[], [1.0]]),
    (("growth", "cool_until"), [-1, 5]),
    (("batches",), [None, {"epoch": 0, "index": 0}, {"epoch": 0, "index": 0, "began": None}]),
    (("batches", "length"), [None, 0, 7]),
    (("others",), [{}, {"a": 1}]),
    (("randomness", "cuda"), [None, []]),
]


@pytest.mark.parametrize(("path", "values"), ODD_STATES)
def test_a_part_of_a_state_that_is_of_another_kind_is_named(
    state: dict[str, Any], path: Path, values: list[Any]
) -> None:
    for value in values:
        with pytest.raises(
            CheckpointError, match=f"it: the state's {path[0]} is missing, or not of its kind"
        ):
            require_state(changed(state, path, value), STEP, "it")


def test_a_state_of_its_kind_is_taken(state: dict[str, Any]) -> None:
    require_state(state, STEP, "it")
    for path, values in SOUND_STATES:
        for value in values:
            require_state(changed(state, path, value), STEP, "it")


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("generators", [], "whole"),
        ("generators", GONE, "whole"),
        ("cuda", 3, "CUDA"),
        ("cuda", GONE, "CUDA"),
        ("python", (3, (1, 2), None), "python"),
        ("numpy", ("MT19937", [1], 0), "numpy"),
        ("torch", None, "torch"),
        ("torch", GONE, "torch"),
    ],
)
def test_a_random_stream_that_is_none_is_named(
    state: dict[str, Any], key: str, value: Any, named: str
) -> None:
    with pytest.raises(CheckpointError, match=f"it: the state of the {named} random stream is not one"):
        require_state(changed(state, ("randomness", key), value), STEP, "it")


def test_a_state_is_of_its_manifests_step_and_a_mapping(state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="the state is of step 63, its manifest of step 62"):
        require_state(state, 62, "it")
    with pytest.raises(CheckpointError, match="the state is a list, no mapping"):
        require_state([], STEP, "it")


def test_a_model_and_its_optimizers_alone_are_no_run(state: dict[str, Any]) -> None:
    alone = {"rest": None, "modules": state["modules"], "optimizers": state["optimizers"]}
    require_state(alone, 0, "it")
    require_genome(b"the caller's own", alone, "it")
    for key in ("modules", "optimizers"):
        with pytest.raises(CheckpointError, match=f"the state's {key} is missing"):
            require_state(changed(alone, (key,), GONE), 0, "it")


def test_a_genome_and_the_growth_of_a_state_are_one(state: dict[str, Any]) -> None:
    genome = read(golden(), NAMES[1]).genome
    require_genome(genome, state, "it")
    for other in (None, {**state["growth"], "plans": []}):
        with pytest.raises(CheckpointError, match="it contradicts itself"):
            require_genome(genome, {**state, "growth": other}, "it")
    with pytest.raises(CheckpointError, match="it: "):
        require_genome(b"{}", state, "it")
