"""A15, A16: little text that asks for much is refused in words, within seconds and small memory."""

from __future__ import annotations

import hashlib
import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from esper.blueprints import CATALOGUE
from esper.config import load_config
from esper.errors import EsperError
from esper.kasmina.branches.choice import read_graph
from esper.nissa.run.journal import EVENTS_FILE, RunJournal, read_events
from esper.saving.save import load_into, save

MOST = 400 << 20  # bytes of Python objects

DEEP = "[" * 200_000
TEXTS = {
    "lists that never end": DEEP,
    "mappings that never end": '{"a":' * 200_000,
    "deep lists that end": "[" * 5_000 + "]" * 5_000,
    "a number of 100,000 digits": "9" * 100_000,
    "a million numbers": "[" + "1," * 1_000_000 + "1]",
    "a key of 100,000 letters": '{"' + "k" * 100_000 + '": 1}',
    "one huge float": '{"a": 1e999999}',
    "not a number": '{"a": NaN}',
    "a half of a pair": '{"a": "\\ud800"}',
    "no text": "\0\0\0\0",
    "nothing": "",
}


def config(place: Path, text: str) -> None:
    (place / "c.yaml").write_text(text)
    load_config(place / "c.yaml")


def blueprint(place: Path, text: str) -> None:
    (place / "mine.json").write_text(text)
    read_graph(place / "mine.json")


def signed(folder: Path) -> None:
    """Let the sums be those of what is there: whoever writes a bomb writes them, too."""
    names = [line.split()[1] for line in (folder / "SHA256SUMS").read_text().splitlines()]
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(sums))


def genome(place: Path, text: str) -> None:
    folder = save(nn.Linear(2, 2), [], place / "grown", card={})
    (folder / "genome.json").write_text(text)
    signed(folder)
    load_into(nn.Linear(2, 2), folder)


def weights(place: Path, text: str) -> None:
    folder = save(nn.Linear(2, 2), [], place / "grown", card={})
    content = text.encode()
    (folder / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content)
    signed(folder)
    load_into(nn.Linear(2, 2), folder)


READERS: dict[str, Callable[[Path, str], None]] = {
    "config": config,
    "blueprint": blueprint,
    "genome": genome,
    "weights": weights,
}


@pytest.mark.parametrize(
    ("reader", "text"),
    [(one, text) for one in READERS for text in TEXTS if (one, text) != ("config", "nothing")],
)
def test_a_bomb_is_refused(tmp_path: Path, reader: str, text: str) -> None:
    tracemalloc.start()
    begun = time.monotonic()
    try:
        with pytest.raises(EsperError) as caught:
            READERS[reader](tmp_path, TEXTS[text])
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()
    assert time.monotonic() - begun < 60
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("text", TEXTS)
def test_a_line_of_a_journal_is_left_out_or_refused(tmp_path: Path, text: str) -> None:
    RunJournal(tmp_path).close()
    (tmp_path / EVENTS_FILE).write_text(TEXTS[text].replace("\n", "") + "\n" + TEXTS[text] + "\n")
    refused = ""
    try:
        assert read_events(tmp_path) == []
    except EsperError as error:
        refused = str(error)
    assert len(refused) < 3000


def nested(fact: str, value: object) -> str:
    return json.dumps({**json.loads(CATALOGUE.get("bottleneck").to_json()), fact: value})


@pytest.mark.parametrize("value", [10**30, -1, 1e300, "9" * 10_000, [[]] * 10_000, {"a": 1}, None, True])
@pytest.mark.parametrize("fact", sorted(json.loads(CATALOGUE.get("bottleneck").to_json())))
def test_a_fact_of_a_blueprint_that_is_another_thing(tmp_path: Path, fact: str, value: object) -> None:
    refused = ""
    try:
        blueprint(tmp_path, nested(fact, value))
    except EsperError as error:
        refused = str(error)
    assert len(refused) < 3000
    assert refused or fact in ("summary", "source") or (fact, value) == ("experimental", True)
