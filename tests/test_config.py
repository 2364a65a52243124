"""Settings: defaults, sources, their order, and messages that say what is wrong and what was meant."""

import os
import re
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


BOMB = "race: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(97 + i)}: &{chr(97 + i)} [{','.join('*' + chr(96 + i) for _ in range(9))}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- race\n- gate\n", "holds a list at its top level"),
        ("race: [1, 2\n", "is not valid YAML"),
        ("race: !!python/object/apply:os.system ['true']\n", "python/object.*stands for no value"),
        ("race: {steps: 4}\nrace: {steps: 5}\n", "line 2: the key 'race' stands twice"),
        ("race: {steps: 4, steps: 5}\n", "line 1: the key 'steps' stands twice"),
        ("3: 4\n", "line 1: the key '3' is no text"),
        (".nan: 4\n", "the key '.nan' is no text"),
        ("null: 4\n", "the key 'null' is no text"),
        ("? [a]\n: 4\n", "the key a sequence is no text"),
        ("[" * 20_000, "nested more than 32 deep"),
        ("{a: " * 20_000, "nested more than 32 deep"),
        ("- " * 5_000, "nested more than 32 deep"),
        ("race: &a [*a]\n", "an alias stands within what it names"),
        (BOMB, "more than 20,000 values, aliases counted"),
        ("race: " + "x" * (1 << 20), "it has more than 1,048,576 bytes"),
        ("race: 2001-99-99\n", r"race: .*\(got '2001-99-99'\)"),
        ("race: !!timestamp 2001-99-99\n", "stands for no value a config holds"),
        ("race: !!int x\n", "is not valid YAML"),
        ("budget: {growth_factor: .inf}\n", r"growth_factor: .*finite number \(got inf\)"),
        ("early: {shares: [.nan]}\n", r"early\.shares\.0: .*finite number"),
        ("early: {shares: [-1.0]}\n", "within 0 and 1"),
        ("widths: {shares: [.nan]}\n", r"widths\.shares\.0: .*finite number"),
        ("widths: {shares: [.inf]}\n", r"widths\.shares\.0: .*finite number"),
        ("widths: {shares: [0.0]}\n", "positive multiple"),
        ("race: {candidates: 1000000}\n", r"race\.candidates: .*less than or equal to 256"),
        ("race: {candidates: true}\n", r"race\.candidates: .*valid integer \(got True\)"),
        ("race: {candidates: '8'}\n", r"race\.candidates: .*valid integer \(got '8'\)"),
        ("kernels: {streams: yes}\n", r"kernels\.streams: .*valid boolean \(got 'yes'\)"),
        ("_env_file: /etc/passwd\n", "unknown key '_env_file'"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_config(path)


def test_plain_words_are_read_as_yaml_1_2_does(tmp_path: Path) -> None:
    path = tmp_path / "plain.yaml"
    path.write_text("growth: off\nrace: {learning_rate: 1e-2}\nbudget: {parameters: 1e6}\n")
    config = load_config(path)
    assert (config.growth, config.race.learning_rate, config.budget.parameters) == ("off", 0.01, 1_000_000)


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/null", "/tmp", "pipe", "\0", "x" * 5000, "loop"])
def test_only_a_regular_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.symlink("loop", "loop")
    with pytest.raises(ConfigError, match="cannot read the config ") as raised:
        load_config(place)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ESPER_RASE__STEPS", "4", "unknown variable 'ESPER_RASE__STEPS'; did you mean 'ESPER_RACE'"),
        ("ESPER_RACE__STEP", "4", "unknown variable 'ESPER_RACE__STEP'; did you mean 'ESPER_RACE__STEPS'"),
        ("ESPER_RACE", "{", "ESPER_RACE='{': it is not valid YAML"),
        ("ESPER_RACE", "4", "ESPER_RACE='4' is no section"),
        ("ESPER_EARLY__SHARES", "nan", "early.shares: Input should be a valid tuple"),
        ("ESPER_BUDGET__GROWTH_FACTOR", ".inf", "finite number"),
        ("ESPER_KERNELS__STREAMS", "yes", "valid boolean"),
    ],
)
def test_a_variable_is_checked(monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config()


def test_variables_give_lists_sections_and_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER_EARLY__SHARES", "[.1, 0.2]")
    monkeypatch.setenv("ESPER_RACE", '{"candidates": 3}')
    monkeypatch.setenv("ESPER_RACE__STEPS", "5")
    monkeypatch.setenv("ESPER_GROWTH", "off")
    monkeypatch.setenv("ESPER_KERNELS__STORE", "/tmp/a: b")
    monkeypatch.setenv("ESPER_KERNEL_KEY", "of the kernel store")
    config = load_config({"race": {"steps": 7}})
    assert (config.early.shares, config.growth, config.kernels.store) == (
        (0.1, 0.2),
        "off",
        Path("/tmp/a: b"),
    )
    assert (config.race.candidates, config.race.steps) == (3, 7)


@pytest.mark.parametrize(
    "source", [3, 2.5, True, b"x", [], (), object(), {1: 2}, {None: 1}, {"race": None}, {"race": {1: 2}}]
)
def test_a_source_of_another_kind_is_refused(source: Any) -> None:
    with pytest.raises(ConfigError):
        load_config(source)


@pytest.mark.parametrize("values", [{"race": 3}, {"rase": {}}, {"blueprints": "widen"}, {"bandit": 3}])
def test_the_class_itself_raises_of_our_tree(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Config(**values)


def test_a_message_repeats_80_characters_of_an_input() -> None:
    with pytest.raises(ConfigError) as raised:
        load_config({"race": {"steps": "x" * 10**6}, "x" * 10**6: 1})
    assert len(str(raised.value)) < 500
    with pytest.raises(ConfigError) as raised:
        load_config({"race": {"steps": "x" * 10**6, "y" * 10**6: 1}})
    assert len(str(raised.value)) < 600


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
