"""Reads YAML nobody vouches for: limited, every key once, and no word that means two things.

Plain words are read as YAML 1.2 does, so ``1e-2`` is a number and a date is text. What YAML 1.1 took for a
truth value, an octal number or a time (``yes``, ``010``, ``1:30``) is an :class:`Unclear` text: fine where
text is asked for, refused where a number or a truth value is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

from esper.errors import ConfigError
from esper.printable import quoted, shortened

MAX_TEXT = 1 << 20  # bytes
MAX_DEPTH = 32  # of lists and mappings within each other
MAX_NODES = 20_000  # values, those an alias repeats counted again
MAX_FAULT = 300  # characters of PyYAML's own words

STRING = "tag:yaml.org,2002:str"
MERGE = "tag:yaml.org,2002:merge"
UNCLEAR = "!unclear"


class Unclear(str):
    """Text that one YAML takes for text and another for a truth value or a number."""

    __slots__ = ()


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader within limits, with fewer and stricter kinds of value."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own
    yaml_constructors: dict[str | None, Callable[..., object]] = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.count = 0
        self.sizes: dict[int, int] = {}  # values in a node, by its identity; a node under way has none

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose within the limits; an alias counts for all it stands for."""
        alias = self.check_event(yaml.AliasEvent)
        before = self.count
        self.count += 1
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self._refuse(f"lists and mappings are nested more than {MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        if alias:
            if id(node) not in self.sizes:
                self._refuse("an alias stands within what it names")
            self.count += self.sizes[id(node)]
        if self.count > MAX_NODES:
            self._refuse(f"there are more than {MAX_NODES:,} values, aliases counted for what they repeat")
        self.depth -= 1
        self.sizes.setdefault(id(node), self.count - before)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a key that is no text or stands twice: readers would not agree on which counts."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set[str]()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag not in (STRING, MERGE, UNCLEAR):
                said = quoted(key.value) if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
                self._refuse(f"the key {said} is no text; write it in quotes, or take it out", key)
            if key.value in seen:
                self._refuse(f"the key {quoted(key.value)} stands twice", key)
            seen.add(key.value)
        return node

    def _refuse(self, reason: str, node: yaml.Node | None = None) -> None:
        mark = node.start_mark if node is not None else self.get_mark()
        raise ConfigError(f"line {mark.line + 1}: {reason}")


def _resolver(tag: str, pattern: str, first: str) -> None:
    _Loader.add_implicit_resolver(tag, re.compile(rf"(?:{pattern})\Z"), list(first))


_resolver("tag:yaml.org,2002:bool", "true|True|TRUE|false|False|FALSE", "tTfF")
_resolver("tag:yaml.org,2002:null", "~|null|Null|NULL|", "~nN\0")
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"\Z"), [""])
_resolver("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+|0o[0-7]+", "-+0123456789")
_resolver(
    "tag:yaml.org,2002:float",
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)|[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "-+0123456789.",
)
_resolver(MERGE, "<<", "<")
_resolver(
    UNCLEAR,
    r"(?i:yes|no|on|off|y|n)|[-+]?0[0-9_]+|[-+]?0b[01_]+|[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?",
    "-+0123456789yYnNoO",
)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, 8 if text.startswith("0o") else 0)


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node).lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _unclear(loader: _Loader, node: yaml.ScalarNode) -> Unclear:
    return Unclear(loader.construct_scalar(node))


def _refused_tag(loader: _Loader, node: yaml.Node) -> None:
    loader._refuse(f"the tag {quoted(node.tag)} stands for no value a config holds; take it out", node)


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)
_Loader.add_constructor(UNCLEAR, _unclear)
for _kind in ("bool", "null", "str", "seq", "map"):
    _Loader.add_constructor(
        f"tag:yaml.org,2002:{_kind}", yaml.SafeLoader.yaml_constructors[f"tag:yaml.org,2002:{_kind}"]
    )
_Loader.yaml_constructors[None] = _refused_tag  # of every other tag


def parse(text: str) -> object:
    """Read one YAML document.

    Raises:
        ConfigError: It is not YAML, is larger than any config, says one key twice, or holds what a config
            does not; the message begins with the line.
    """
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError, LookupError, OverflowError, RecursionError) as error:
        words = shortened(" ".join(str(error).split()), MAX_FAULT)
        raise ConfigError(f"it is not valid YAML: {words}") from None
    finally:
        if loader is not None:
            loader.dispose()
