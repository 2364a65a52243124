"""The public surface is this list; a name enters or leaves it here, never by accident."""

import inspect
import subprocess
import sys

import pytest

import esper

SURFACE = [
    "BlueprintError",
    "CheckpointError",
    "CompileError",
    "Config",
    "ConfigError",
    "EsperError",
    "FinishedError",
    "ForgeError",
    "Growth",
    "KernelError",
    "LossError",
    "MissingExtraError",
    "MorphableModel",
    "OptimizerError",
    "ProbeError",
    "ProcessError",
    "RegistryError",
    "RunError",
    "SavedModelError",
    "SiteError",
    "StateError",
    "StoreError",
    "SurgeryError",
    "Trainer",
    "TransitionError",
    "__version__",
    "errors",
    "grow",
    "load_config",
    "load_into",
    "plan",
    "summary",
    "unwrap",
    "wrap",
]


def test_the_surface_is_this_list() -> None:
    assert esper.__all__ == SURFACE
    assert dir(esper) == SURFACE


@pytest.mark.parametrize("name", SURFACE)
def test_every_name_resolves_and_explains_itself(name: str) -> None:
    value = getattr(esper, name)
    if name != "__version__":
        assert inspect.getdoc(value)


def test_the_version_is_the_installed_one() -> None:
    assert esper.__version__.split(".") >= ["0", "1", "0"]


def test_every_error_of_the_tree_is_public() -> None:
    tree = {name: value for name, value in vars(esper.errors).items() if inspect.isclass(value)}
    mine = {name: value for name, value in tree.items() if issubclass(value, esper.EsperError)}
    assert mine == {name: getattr(esper, name) for name in SURFACE if name.endswith("Error")}


def test_a_miss_names_the_nearest() -> None:
    with pytest.raises(AttributeError, match=r"'esper' has no attribute 'wrpa'; did you mean 'wrap'\?"):
        esper.wrpa  # noqa: B018


def test_star_import_gives_the_surface() -> None:
    names: dict[str, object] = {}
    exec("from esper import *", names)
    assert set(SURFACE) <= names.keys()


@pytest.mark.parametrize("heavy", ["torch", "numpy", "pydantic", "typer", "rich"])
def test_importing_esper_is_cheap(heavy: str) -> None:
    code = f"import sys, esper; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
