import json
from pathlib import Path

import pytest

BENCH = '''"""{about}

More words."""
import os, sys
from benchmarks import shared


def main(argv: list[str]) -> int:
    print("ran with", argv, shared.WORD)
    return {code}
'''


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "shared.py").write_text('"""No bench."""\nWORD = "together"\n')
    (folder / "fast_enough.py").write_text(BENCH.format(about="Is it fast?", code=0))
    (folder / "big_enough.py").write_text(BENCH.format(about="Is it big?", code=1))
    return tmp_path


def test_without_a_name_they_are_listed_with_their_first_line(esper, checkout: Path) -> None:
    ran = esper("bench", cwd=checkout)
    assert ran.returncode == 0
    assert [line.split(maxsplit=1) for line in ran.stdout.splitlines()] == [
        ["big-enough", "Is it big?"],
        ["fast-enough", "Is it fast?"],
    ]
    listed = json.loads(esper("bench", "--json", cwd=checkout).stdout)
    assert listed == {"big-enough": "Is it big?", "fast-enough": "Is it fast?"}


def test_a_bench_gets_its_options_and_gives_the_exit_code(esper, checkout: Path) -> None:
    ran = esper("bench", "fast-enough", "--seeds", 3, "--json", "-h", cwd=checkout)
    assert (ran.returncode, ran.stdout) == (0, "ran with ['--seeds', '3', '--json', '-h'] together\n")
    assert esper("bench", "big-enough", cwd=checkout).returncode == 1


def test_an_unknown_bench_names_the_nearest(esper, checkout: Path) -> None:
    ran = esper("bench", "fast-enuogh", cwd=checkout)
    assert ran.returncode == 2
    assert "did you mean 'fast-enough'? known: big-enough, fast-enough" in ran.stderr


def test_elsewhere_the_checkout_of_the_editable_install_is_used(esper) -> None:
    ran = esper("bench")
    assert ran.returncode == 0
    assert "student-teacher" in ran.stdout
