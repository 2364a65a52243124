"""Settings: defaults, sources, their order, and messages that say what is wrong and what was meant."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from esper.config import Config, load_config
from esper.errors import ConfigError


def sections() -> list[tuple[str, str]]:
    """Every (section, field) of the settings."""
    return [
        (name, key)
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        for key in field.annotation.model_fields
    ]


def describe(section: str, key: str) -> str | None:
    annotation = Config.model_fields[section].annotation
    assert isinstance(annotation, type)
    assert issubclass(annotation, BaseModel)
    return annotation.model_fields[key].description


@pytest.mark.parametrize(("section", "key"), sections())
def test_every_setting_is_described(section: str, key: str) -> None:
    assert describe(section, key)


def test_nothing_given_is_the_defaults() -> None:
    assert load_config() == load_config(None) == load_config({}) == Config()


def test_a_config_passes_through_as_the_same_object() -> None:
    config = Config()
    assert load_config(config) is config


def test_file_mapping_and_override_agree(tmp_path: Path) -> None:
    path = tmp_path / "growth.yaml"
    path.write_text("race:\n  candidates: 3\nbandit: thompson\n")
    expected = load_config({"race": {"candidates": 3}, "bandit": "thompson"})
    assert load_config(path) == load_config(str(path)) == expected
    assert load_config(path, race={"candidates": 5}).race.candidates == 5
    assert load_config(expected, bandit="ucb").race.candidates == 3


def test_empty_file_is_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing set\n")
    assert load_config(path) == Config()


def test_environment_fills_in_and_what_is_given_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_RACE__CANDIDATES", "4")
    monkeypatch.setenv("ESPER_BANDIT", "thompson")
    assert load_config().race.candidates == 4
    config = load_config({"race": {"candidates": 6}})
    assert config.race.candidates == 6
    assert config.bandit == "thompson"


def test_environment_mistake_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_RACE__CANDIDATES", "many")
    with pytest.raises(ConfigError, match=r"race\.candidates.*'many'"):
        load_config()


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"rase": {}}, r"unknown key 'rase'; did you mean 'race'\?"),
        ({"race": {"canditates": 4}}, r"unknown key 'race\.canditates'; did you mean 'candidates'\?"),
        ({"race": {"candidates": 0}}, r"race\.candidates: .*greater than or equal to 1 \(got 0\)"),
        ({"gate": {"false_keep": 1}}, r"gate\.false_keep: .*less than 1"),
        ({"race": 7}, r"race: .*\(got 7\)"),
        ({"new_slot_state": "ones"}, r"new_slot_state: .*'zeros', 'seed' or 'mean'"),
        ({"budget": {"parameters": 0}}, r"budget\.parameters: .*greater than or equal to 1"),
        (
            {"budget": {"parameters": 4.5}},
            r"budget\.parameters: .*a whole number; growth_factor .*\(got 4\.5\)",
        ),
        ({"budget": {"model_flops": 1.5}}, r"budget\.model_flops: .*flops_factor .*\(got 1\.5\)"),
        ({"budget": {"growth_factor": 1}}, r"budget\.growth_factor: .*greater than 1"),
        ({"budget": {"flops_factor": 0.5}}, r"budget\.flops_factor: .*greater than 1"),
        ({"growth": "incubat"}, r"growth: .*'auto', 'early', 'incubate' or 'off'"),
        ({"a": 1, "b": 2}, r"unknown key 'a'.*; unknown key 'b'"),
    ],
)
def test_mistakes_say_where_what_and_the_nearest_name(given_: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(given_)


@given(st.text(min_size=1).filter(lambda key: key not in Config.model_fields))
def test_no_unknown_key_is_ever_accepted(key: str) -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        load_config({key: 1})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- race\n- gate\n", "holds a list at its top level"),
        ("race: [1, 2\n", "is not valid YAML"),
        ("race: !!python/object/apply:os.system ['true']\n", "is not valid YAML"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_config(path)


def test_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.yaml"
    path.write_bytes(b"\xff\xfe\x00\x93NUMPY")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_config(path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the config .*absent\.yaml: No such file"):
        load_config(tmp_path / "absent.yaml")


def test_settings_are_frozen() -> None:
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.bandit = "thompson"
    with pytest.raises(ValidationError, match="frozen"):
        config.race.candidates = 2
