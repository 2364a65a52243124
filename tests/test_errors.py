"""The tree drawn atop errors.py is the tree, and every message can say what was meant."""

import inspect
import pickle
import re

import pytest

from esper import errors

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and value.__module__ == errors.__name__
}


def drawn() -> dict[str, tuple[str, str | None]]:
    """Read the tree of the docstring: class -> (parent, builtin)."""
    found: dict[str, tuple[str, str | None]] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"(?P<branch>[│ ]*)[├└]── (?P<name>\w+)(?:\s+\((?P<builtin>\w+)\))?", line)
        if match:
            depth = len(match["branch"]) // 4
            path[depth:] = [match["name"]]
            found[match["name"]] = (path[depth - 1] if depth else "EsperError", match["builtin"])
    return found


def test_drawing_is_the_tree() -> None:
    tree = drawn()
    assert tree.keys() | {"EsperError"} == CLASSES.keys()
    for name, (parent, builtin) in tree.items():
        bases = [base.__name__ for base in CLASSES[name].__bases__]
        assert bases == [parent, *([builtin] if builtin else [])], name


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_error_is_an_esper_error_with_a_line_of_its_own(name: str) -> None:
    assert issubclass(CLASSES[name], errors.EsperError)
    assert CLASSES[name].__doc__


def test_missing_extra_prints_its_pip_line() -> None:
    error = errors.MissingExtraError("matplotlib", "report", "esper report")
    assert str(error) == "esper report needs matplotlib; install it with: pip install 'esper-morph[report]'"
    assert isinstance(error, ImportError)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is errors.MissingExtraError
    assert (str(again), again.package, again.extra) == (str(error), "matplotlib", "report")


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - {"MissingExtraError"}))
def test_errors_cross_process_boundaries(name: str) -> None:
    error = pickle.loads(pickle.dumps(CLASSES[name]("fc1>fc2 cannot grow")))
    assert type(error) is CLASSES[name]
    assert str(error) == "fc1>fc2 cannot grow"


@pytest.mark.parametrize(
    ("asked", "known", "said"),
    [
        ("warmpu", ["stop", "warmup"], "did you mean 'warmup'? known: stop, warmup"),
        ("zzz", ["stop", "warmup"], "known: stop, warmup"),
        ("ucb", [], "known: none"),
    ],
)
def test_nearest_names_what_was_meant_and_what_exists(asked: str, known: list[str], said: str) -> None:
    assert errors.nearest(asked, known) == said
