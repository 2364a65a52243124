"""A name is a file: real packages on disk, real entry points of an installed distribution."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from esper.errors import MissingExtraError, RegistryError
from esper.registry import Registry

MakePlugins = Callable[[dict[str, str]], Registry]


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakePlugins:
    """Write a folder of files into a fresh package that can be imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "garden"]:
        monkeypatch.delitem(sys.modules, name)

    def make(files: dict[str, str]) -> Registry:
        folder = tmp_path / "garden" / "seeds"
        folder.mkdir(parents=True)
        (tmp_path / "garden" / "__init__.py").write_text("")
        (folder / "__init__.py").write_text("")
        for name, text in files.items():
            (folder / name).write_text(text)
        return Registry("garden.seeds", group="garden.seeds")

    return make


def install(tmp_path: Path, lines: list[str], name: str = "neighbour") -> None:
    """Lay down what an installer would: a distribution that declares entry points."""
    info = tmp_path / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join(["[garden.seeds]", *lines]))


def test_the_file_name_is_the_name(plugins: MakePlugins) -> None:
    registry = plugins(
        {
            "oak.py": "__all__ = ['Oak']\nclass Oak: pass\n",
            "fern.py": "__all__ = ['grow']\ndef grow(): pass\n",
        }
    )
    assert registry.names() == ["fern", "oak"]
    assert registry.get("oak").__name__ == "Oak"
    assert registry.get("fern").__name__ == "grow"
    assert registry.get("oak") is registry.get("oak")


def test_names_imports_nothing(plugins: MakePlugins) -> None:
    registry = plugins({"bomb.py": "raise SystemExit('imported')\n", "_shared.py": ""})
    assert registry.names() == ["bomb"]
    assert "garden.seeds.bomb" not in sys.modules


def test_a_miss_lists_what_exists(plugins: MakePlugins) -> None:
    registry = plugins({"oak.py": "", "fern.py": ""})
    with pytest.raises(
        RegistryError, match=r"garden\.seeds has no 'oack'; did you mean 'oak'\? known: fern, oak"
    ):
        registry.get("oack")


@pytest.mark.parametrize("name", ["os", "..oak", "oak.leaf", "__init__", "_shared", ""])
def test_only_listed_names_are_imported(plugins: MakePlugins, name: str) -> None:
    registry = plugins({"oak.py": "__all__ = ['Oak']\nclass Oak: pass\n", "_shared.py": ""})
    with pytest.raises(RegistryError, match="known: oak"):
        registry.get(name)


@pytest.mark.parametrize("exports", ["", "__all__ = []\n", "__all__ = ['A', 'B']\nA = B = 1\n"])
def test_a_file_must_export_one_object(plugins: MakePlugins, exports: str) -> None:
    with pytest.raises(RegistryError, match=r"garden\.seeds\.oak must name one object in __all__"):
        plugins({"oak.py": exports}).get("oak")


def test_other_packages_add_names(plugins: MakePlugins, tmp_path: Path) -> None:
    registry = plugins({"oak.py": "__all__ = ['Oak']\nclass Oak: pass\n"})
    (tmp_path / "neighbour.py").write_text("class Moss: pass\n")
    install(tmp_path, ["moss = neighbour:Moss"])
    assert registry.names() == ["oak", "moss"]
    assert registry.get("moss").__name__ == "Moss"


def test_a_name_claimed_twice_is_refused(plugins: MakePlugins, tmp_path: Path) -> None:
    registry = plugins({"oak.py": "__all__ = ['Oak']\nclass Oak: pass\n"})
    install(tmp_path, ["oak = neighbour:Oak", "ivy = neighbour:Ivy"])
    install(tmp_path, ["ivy = stranger:Ivy"], name="stranger")
    assert registry.names() == ["oak", "ivy"]
    with pytest.raises(RegistryError, match=r"'oak' is claimed by garden\.seeds and neighbour:Oak"):
        registry.get("oak")
    with pytest.raises(RegistryError, match=r"'ivy' is claimed by .*stranger:Ivy"):
        registry.get("ivy")


@pytest.mark.parametrize("value", ["absent_module:Moss", "string:Moss"])
def test_a_broken_entry_point_is_named(plugins: MakePlugins, tmp_path: Path, value: str) -> None:
    registry = plugins({"oak.py": ""})
    install(tmp_path, [f"moss = {value}"])
    with pytest.raises(RegistryError, match=rf"'moss' \({value}\) cannot be imported: .+"):
        registry.get("moss")


def test_a_missing_extra_keeps_its_pip_line(plugins: MakePlugins, tmp_path: Path) -> None:
    text = "from esper.errors import MissingExtraError\nraise MissingExtraError('redis', 'redis', 'this')\n"
    registry = plugins({"oak.py": text})
    (tmp_path / "thirsty.py").write_text(text)
    install(tmp_path, ["moss = thirsty:Moss"])
    for name in ("oak", "moss"):
        with pytest.raises(MissingExtraError, match=r"pip install 'esper-morph\[redis\]'"):
            registry.get(name)


@pytest.mark.parametrize("package", ["json.decoder", "json.absent"])
def test_a_registry_needs_a_folder(package: str) -> None:
    with pytest.raises(RegistryError, match="is not a folder of modules"):
        Registry(package, group="garden.seeds").names()
