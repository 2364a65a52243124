"""Settings in variables: ``ESPER_RACE__CANDIDATES=4``; a name that stands for no setting is an error."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic import BaseModel

from esper.errors import ConfigError, nearest
from esper.printable import quoted
from esper.yaml_text import parse

PREFIX = "ESPER_"
OTHERS = ("ESPER_KERNEL_STORE", "ESPER_KERNEL_KEY")  # of the kernel store, no settings


def from_environment(model: type[BaseModel], variables: Mapping[str, str] | None = None) -> dict[str, object]:
    """Read the settings that variables give, by section.

    Args:
        model: Model of the settings.
        variables: Variables by name; None: the process's own.

    Raises:
        ConfigError: A variable stands for no setting (the nearest is named), or holds no value.
    """
    known = dict(_settings(model))
    found: dict[str, object] = {}
    for name, text in sorted((os.environ if variables is None else variables).items()):
        upper = name.upper()
        if not upper.startswith(PREFIX) or upper in OTHERS:
            continue
        if upper not in known:
            raise ConfigError(f"unknown variable {quoted(name)}; {_nearest(upper, known)}")
        *sections, key = upper[len(PREFIX) :].lower().split("__")
        place = found
        for section in sections:
            inner = place.setdefault(section, {})
            assert isinstance(inner, dict)  # a section comes before its fields: P before P__F
            place = inner
        place[key] = _value(name, text, known[upper])
    return found


def _settings(model: type[BaseModel], prefix: str = PREFIX) -> Iterator[tuple[str, object]]:
    """List the variables of every setting and section, with what may stand there."""
    for name, field in model.model_fields.items():
        yield prefix + name.upper(), field.annotation
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _settings(field.annotation, f"{prefix}{name.upper()}__")


def _nearest(name: str, known: Iterable[str]) -> str:
    """Name what was probably meant: a section or setting, or a setting of the section that is named."""
    section = name.rpartition("__")[0]
    inside = [one for one in known if section in known and one.startswith(f"{section}__")]
    return nearest(name, inside or [*(one for one in known if "__" not in one), *OTHERS])


def _value(name: str, text: str, annotation: object) -> object:
    """Read a variable as YAML, which JSON is too; where text is asked for, it is the text."""
    if annotation is str or get_origin(annotation) is Literal or Path in get_args(annotation):
        return text
    try:
        value = parse(text)
    except ConfigError as error:
        raise ConfigError(f"{name}={quoted(text)}: {error}") from None
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and not isinstance(value, dict):
        raise ConfigError(f"{name}={quoted(text)} is no section; write {name}='{{name: value}}'")
    return value
