"""A disk of the rehearsal's own really runs full and really becomes read-only, and nobody else sees it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.chaos.disk import FILLER, Disk, join
from esper.errors import RunError

USE = """
import sys
from pathlib import Path
from esper.chaos import disk

folder = Path(sys.argv[2])
disk.join(int(sys.argv[1]))
(folder / "kept").write_bytes(bytes(10_000))


def tried(path):
    try:
        path.write_bytes(bytes(200_000))
    except OSError as error:
        return error.strerror
    return "written"


said = [tried(folder / "a")]
disk.fill(folder)
said.append(tried(folder / "b"))
disk.free(folder)
said.append(tried(folder / "c"))
below = folder / "below"
below.mkdir()
disk.freeze(below)
said += [tried(below / "d"), tried(folder / "e")]
disk.thaw(below)
said.append(tried(below / "f"))
print(*said, sep=", ")
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    try:
        held = Disk(tmp_path / "disk", 1 << 20)
    except RunError as error:
        pytest.skip(str(error))
    yield held
    held.close()


def use(disk: Disk, folder: Path) -> str:
    line = [sys.executable, "-W", "error", "-c", USE, str(disk.process.pid), str(folder)]
    ran = subprocess.run(line, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_it_runs_full_and_becomes_read_only_for_those_who_joined(disk: Disk, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    said = use(disk, folder)
    assert said == "written, No space left on device, written, Read-only file system, written, written"
    assert not list(folder.iterdir())  # seen from outside
    assert not (folder / FILLER).exists()


def test_what_is_on_it_lasts_from_process_to_process(disk: Disk, tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    look = "import sys; from pathlib import Path; from esper.chaos import disk\n"
    look += "disk.join(int(sys.argv[1])); p = Path(sys.argv[2]) / 'x'\n"
    look += "print(p.exists()); p.write_text('here')"
    line = [sys.executable, "-c", look, str(disk.process.pid), str(folder)]
    found = [subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip() for _ in "ab"]
    assert found == ["False", "True"]


def test_a_process_that_holds_none_cannot_be_joined(disk: Disk, tmp_path: Path) -> None:
    disk.close()
    with pytest.raises(RunError, match="cannot join the disk of process"):
        join(disk.process.pid)
