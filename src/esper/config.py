"""One typed settings model: file, ``ESPER_*`` variables and overrides; unknown keys name the nearest one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, Field, ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from esper.environment import from_environment
from esper.errors import ConfigError, nearest
from esper.files import read_regular
from esper.printable import QUOTE, quoted
from esper.sections import (
    Blend,
    Budget,
    Distributed,
    Early,
    Gate,
    Governor,
    Kernels,
    Race,
    Schedule,
    Telemetry,
    Widths,
)
from esper.yaml_text import MAX_TEXT, parse

MOST_FAULTS = 8  # told of one config


class Variables(InitSettingsSource):
    """The settings that ``ESPER_*`` variables give."""

    def __init__(self, settings: type[BaseSettings]) -> None:
        super().__init__(settings, from_environment(settings))


class Config(BaseSettings):
    """All settings; environment variables look like ``ESPER_RACE__CANDIDATES=4``."""

    model_config = SettingsConfigDict(
        env_prefix="ESPER_", env_nested_delimiter="__", extra="forbid", frozen=True
    )

    growth: Literal["auto", "early", "incubate", "off"] = Field(
        "auto",
        description="early: a few events, all places at once; incubate: candidates are raced at one place at "
        "a time; off; auto: early, and incubate where most of the model is frozen or only branches fit",
    )
    early: Early = Early()
    schedule: Schedule = Schedule()
    race: Race = Race()
    gate: Gate = Gate()
    blend: Blend = Blend()
    widths: Widths = Widths()
    budget: Budget = Budget()
    kernels: Kernels = Kernels()
    telemetry: Telemetry = Telemetry()
    governor: Governor = Governor()
    distributed: Distributed = Distributed()
    blueprints: tuple[str, ...] = Field(
        ("auto",),
        min_length=1,
        max_length=256,
        description="what may grow: widen, deepen, names of the catalogue, paths of JSON files; auto widens "
        "and deepens, and offers the catalogue to a model in which nothing can be widened",
    )
    bandit: str = Field("ucb", description="how arms are chosen: a name in tamiyo/bandits")
    bandit_settings: dict[str, float] = Field(
        default_factory=dict,
        max_length=32,
        description="arguments of the bandit, by name: what its class takes",
    )
    new_slot_state: Literal["zeros", "seed", "mean"] = Field(
        "zeros", description="optimizer state of new units; zeros measured best, see docs/decisions.md"
    )

    def __init__(self, **values: object) -> None:
        """Check what is given.

        Raises:
            ConfigError: A key is unknown (the nearest is named), or a value out of kind or range.
        """
        given: dict[str, Any] = values  # pydantic checks them
        known = type(self).model_fields
        unknown = [name for name in values if name not in known]  # pydantic-settings' own too: _env_file …
        if unknown:
            said = (f"unknown key {quoted(name)}; {nearest(name, known)}" for name in unknown[:MOST_FAULTS])
            raise ConfigError("; ".join(said))
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise ConfigError(explain(error, Config)) from None
        if self.governor.enabled and self.schedule.concurrent > 1:
            raise ConfigError(
                f"schedule.concurrent is {self.schedule.concurrent}, but the governor examines one seed at a "
                "time; set it to 1, or governor.enabled to false"
            )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read variables as files are read; nothing else is looked for."""
        return init_settings, Variables(settings_cls)


ConfigLike: TypeAlias = Config | Mapping[str, object] | str | Path | None


def load_config(source: ConfigLike = None, **overrides: object) -> Config:
    """Read settings from a YAML file, a mapping or a ``Config``.

    Args:
        source: Path of a YAML file, a mapping of sections, a ``Config``, or None for the defaults.
        overrides: Sections that replace what the source says.

    Raises:
        ConfigError: The file cannot be read, a key is unknown (the nearest is named) or a value out of range.
    """
    if isinstance(source, Config) and not overrides:
        return source
    if isinstance(source, Config):
        data: dict[str, object] = source.model_dump()
    elif source is None:
        data = {}
    elif isinstance(source, Mapping):
        data = dict(source)
    elif isinstance(source, str | Path):
        data = read_yaml(Path(source))
    else:
        raise ConfigError(
            f"config={quoted(source)}; give a Config, a mapping of sections, or the path of a YAML file"
        )
    for key in data:
        if not isinstance(key, str):
            raise ConfigError(f"the key {quoted(key)} is no text; known: {', '.join(Config.model_fields)}")
    return Config(**{**data, **overrides})


def read_yaml(path: Path) -> dict[str, object]:
    """Read a YAML file whose top level is a mapping.

    Raises:
        ConfigError: The file is missing, is not YAML or is not a mapping.
    """
    content = read_regular(path, limit=MAX_TEXT, what="the config", error=ConfigError)
    try:
        data = parse(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path} holds a {type(data).__name__} at its top level; a mapping of sections is needed"
        )
    return data


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Turn pydantic's report into one line per fault, naming the nearest key where one is unknown."""
    lines = []
    faults = error.errors(include_url=False)
    for fault in faults[:MOST_FAULTS]:
        path = [str(part)[:QUOTE] for part in fault["loc"]]
        if fault["type"] == "extra_forbidden":
            lines.append(f"unknown key {'.'.join(path)!r}; {nearest(path[-1], keys_at(model, path[:-1]))}")
        else:
            lines.append(f"{'.'.join(path)}: {fault['msg']} (got {quoted(fault.get('input'))})")
    if len(faults) > MOST_FAULTS:
        lines.append(f"and {len(faults) - MOST_FAULTS} more")
    return "; ".join(lines)


def keys_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """List the keys a (nested) section knows."""
    section = model
    for part in path:
        annotation = section.model_fields[part].annotation if part in section.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        section = annotation
    return list(section.model_fields)
