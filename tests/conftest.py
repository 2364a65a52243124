"""What every test gets: one thread, the same seed, no settings from outside, and no trace left behind."""

import os
import random
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile(
    "house", deadline=None, derandomize=True
)  # nothing here is timed, and CI repeats itself
settings.load_profile("house")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers on two cores; before torch is imported

# Set by the libraries themselves while they start; not ours to clean up.
TOLERATED = {
    "PYTEST_CURRENT_TEST",
    "KMP_INIT_AT_FORK",
    "KMP_DUPLICATE_LIB_OK",
    "TORCHINDUCTOR_CACHE_DIR",
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hide the developer's ESPER_* variables, and fail the test that leaks one of its own."""
    before = dict(os.environ)
    for name in before:
        if name.startswith("ESPER_"):
            monkeypatch.delenv(name)
    yield
    monkeypatch.undo()
    leaked = {name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)}
    for name in leaked - TOLERATED:
        os.environ.pop(name, None)
        os.environ.update({name: before[name]} if name in before else {})
    assert not leaked - TOLERATED, f"environment variables leaked: {sorted(leaked - TOLERATED)}"


@pytest.fixture(autouse=True)
def same_seed() -> None:
    """Start every test from seed 0, whichever worker runs it and whatever ran before."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not _has_cuda():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
