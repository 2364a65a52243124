"""A16: text nobody vouches for is read within limits, or is a ConfigError; seconds and memory stay small."""

from __future__ import annotations

import pytest

from esper.errors import ConfigError
from esper.yaml_text import parse

BOMB = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
REFUSED = {
    "an alias bomb": BOMB,
    "an alias of itself": "&a [*a]",
    "lists 20,000 deep": "[" * 20_000,
    "mappings 20,000 deep": "{a: " * 20_000,
    "blocks 400 deep": "\n".join("  " * i + "a:" for i in range(400)),
    "dashes 20,000 deep": "- " * 20_000 + "x",
    "a million values": "[" + "1," * 1_000_000 + "1]",
    "a key twice": "lr: 1\nlr: 2",
    "a key twice, deep": "a: {b: {c: 1, c: 2}}",
    "a python object": "!!python/object/apply:os.system ['true']",
    "a python name": "!!python/name:os.system",
    "a python module": "!!python/module:os",
    "a tag of one's own": "!evil {a: 1}",
    "two documents": "a: 1\n---\nb: 2",
    "an unknown alias": "a: *b",
    "an open quote": 'a: "x',
    "an open list": "a: [1, 2",
    "a tab": "a:\n\t- 1",
    "a NUL": "a: \0",
    "a control character": "a: \x07",
    "a directive": "%YAML 9.9\n---\na: 1",
    "a list as a key": "[1, 2]: 3",
    "a mapping as a key": "{a: 1}: 3",
    "an integer of 10,000 digits": "a: " + "9" * 10_000,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_config_holds_is_refused(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(REFUSED[name])
    assert len(str(caught.value)) < 1000
