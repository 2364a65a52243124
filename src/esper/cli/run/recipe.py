"""What ``esper train`` reads: a YAML file that names a model, its data and how to train it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from esper.config import Config, explain, load_config, read_yaml
from esper.errors import ConfigError, nearest
from esper.printable import quoted
from esper.yaml_text import Unclear

MOST_EPOCHS = 10**9
MOST_SEED = 2**32 - 1  # what NumPy takes


class Call(BaseModel):
    """``module:callable`` with keyword arguments; a bare string stands for a call without any."""

    model_config = ConfigDict(frozen=True, strict=True)

    call: str
    arguments: dict[str, object] = {}


def _as_call(value: object) -> object:
    """Accept the short form, and name the nearest key of an unknown one."""
    if isinstance(value, str):
        return {"call": value}
    if isinstance(value, Mapping):
        for key in value:
            if key not in Call.model_fields:
                raise ConfigError(f"unknown key {quoted(key)}; {nearest(str(key), Call.model_fields)}")
        _refuse_unclear(value.get("arguments"), "arguments")
    return value


def _refuse_unclear(value: object, where: str) -> None:
    """Refuse a word that may mean a truth value or a number: no type says here which is meant."""
    if isinstance(value, Unclear):
        raise ConfigError(
            f"{where}: {quoted(str(value))} is text in one YAML and a truth value or number in another; "
            "write true, false or a decimal number, or put it in quotes"
        )
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_unclear(item, f"{where}.{quoted(key)}")
    elif isinstance(value, list):
        for item in value:
            _refuse_unclear(item, where)


CallLike = Annotated[Call, BeforeValidator(_as_call)]


class Checkpoints(BaseModel):
    """When to keep checkpoints in the run folder, and how many."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every_seconds: float | None = Field(None, gt=0, allow_inf_nan=False)
    every_steps: int | None = Field(None, ge=1)
    keep: int | None = Field(3, ge=1)  # of the newest; None: all

    @model_validator(mode="after")
    def _one_of_them(self) -> Checkpoints:
        if self.every_seconds is not None and self.every_steps is not None:
            raise ConfigError(
                "checkpoints: every_seconds and every_steps are both given; give one of them, or none: then "
                "their measured cost says how often"
            )
        return self


class Recipe(BaseModel):
    """A training run as data."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: CallLike  # returns an nn.Module
    data: (
        CallLike  # returns a mapping or object with train, probe and, if wanted, val: re-iterables of batches
    )
    loss: CallLike  # cross_entropy, mse, or a function (model, batch) -> scalar tensor
    optimizer: CallLike  # called with the model's parameters
    scheduler: CallLike | None = None  # called with the optimizer
    metrics: dict[
        str, CallLike
    ] = {}  # accuracy, mse, or functions (model, batch) -> float, by the name to report
    batch_axis: int | None = Field(None, ge=0, strict=True)  # of the examples, as for esper.grow
    epochs: int = Field(ge=1, le=MOST_EPOCHS)
    seed: int = Field(0, ge=0, le=MOST_SEED, strict=True)  # of torch, NumPy, Python and growth
    checkpoints: Checkpoints | None = None  # given, they are kept; None: only with --resume
    growth: dict[str, Any] = {}  # sections of esper.Config
    run_dir: str | None = Field(None, pattern=r"^[^\x00]+$")

    def calls(self) -> dict[str, Call]:
        """Return everything the config calls, by the key that says so."""
        found = {"model": self.model, "data": self.data, "loss": self.loss, "optimizer": self.optimizer}
        found |= {} if self.scheduler is None else {"scheduler": self.scheduler}
        return found | {f"metrics.{name}": spec for name, spec in self.metrics.items()}


def read_recipe(path: Path) -> Recipe:
    """Read and check a training config.

    Raises:
        ConfigError: The file cannot be read; a key is unknown (the nearest is named), missing or wrong.
    """
    try:
        return Recipe.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, Recipe)}") from None


def growth_settings(path: Path, recipe: Recipe) -> Config:
    """Read a recipe's settings of growth.

    Raises:
        ConfigError: A key is unknown or a value out of range.
    """
    try:
        return load_config(recipe.growth)
    except ConfigError as error:
        raise ConfigError(f"{path}: growth: {error}") from None
