"""Mutants of a toy are the known ones, nothing on disk changes, and tests that look see them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import mutants
from benchmarks.equivalents import EQUIVALENT
from benchmarks.mutations import mutations
from benchmarks.nursery import ROOT, Trial, Verdict
from benchmarks.tried import tree

TOY = '''"""A toy: 1 < 2."""
from __future__ import annotations
LIMIT: int = 3

def room(taken: int | None, names: list[str] = []) -> int | None:
    """Say what is free."""
    if taken is None or not names:
        raise ValueError(f"{names} of {LIMIT + 1}")
    if taken < 0:
        taken = 0
    return max(LIMIT - taken, 0)
'''
TESTS = """
import subprocess, sys
import pytest
from toy import room

def test_in_this_process():
    assert room(1, ["a"]) == 2 and room(4, ["a"]) == 0
    with pytest.raises(ValueError):
        room(None, ["a"])

def test_in_another():
    line = "import toy; assert toy.room(-1, 'a') == 3"
    subprocess.run([sys.executable, "-c", line], check=True)
"""


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        ("x = a <= b", ["a <= b → (a < b)", "a <= b → (a > b)"]),
        (
            "x = a is not b in c",
            ["a is not b in c → (a is b in c)", "a is not b in c → (a is not b not in c)"],
        ),
        ("x = 0.5", ["0.5 → 0", "0.5 → 1.5"]),
        ("x = 0 + 0", ["0 + 0 → (0 - 0)", "0 → 1", "0 → 1 (2)"]),
        ("x = 'a' + b", []),
        ("x: int = -True", ["-True → (True)", "True → False"]),
        ("Kind = A | dict[str, B]", []),
        ("def f(a: 'b' = 0, *, c=None) -> 1:\n    return None", ["0 → 1"]),
        ("def f():\n    return g(not a)", ["g(not a) → None", "not a → (a)"]),
        ("def f(a):\n    a.b = c\n    d = e", ["a.b = c → pass"]),
        ("def f(a):\n    a.b -= c", ["a.b -= c → a.b += c", "a.b -= c → pass"]),
        ("if a:\n    b", ["a → False", "a → True"]),
        ("if a:\n    raise B(1 < 2)", ["a → False", "a → True"]),
        ("if (a := b):\n    raise C", []),
        ("raise A", ["raise A → pass"]),
        ("x = [a for a in min(b) if c]", ["c → False", "c → True", "min → max"]),
        ("logger.info(1)\nf(a)\ndel b", ["del b → pass", "f(a) → pass"]),
        (
            "for a in b:\n    break\nwhile c:\n    continue",
            ["break → continue", "c → False", "continue → break"],
        ),
        ("@d(1)\nclass A:\n    '''0'''\n    b = f'{1}'", []),
    ],
)
def test_what_is_changed(source: str, changes: list[str]) -> None:
    found = mutations(source)
    assert sorted(one.change for one in found) == changes
    for one in found:
        compile(one.apply(source), "changed", "exec")
        assert one.apply(source) != source


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    (tmp_path / "src").mkdir()
    (tmp_path / "src/toy.py").write_text(TOY)
    (tmp_path / "test_toy.py").write_text(TESTS)
    return tmp_path


def test_the_toys_mutants_end_as_they_must(toy: Path) -> None:
    with mutants.Runs(2, toy) as runs:
        tally = mutants.judge(runs, toy, "src/toy.py", ("test_toy.py",), seed=3, count=5)
        with pytest.raises(ValueError, match="do not pass unchanged"):
            mutants.judge(runs, toy, "src/toy.py", ("nothing.py",), seed=1, count=1)
    assert (toy / "src/toy.py").read_text() == TOY
    assert not (toy / "src/__pycache__").exists() or not list((toy / "src/__pycache__").glob("toy*"))
    line = "if taken < 0:"
    same = {(line, "taken < 0 → (taken <= 0)"), (line, "0 → 1")}  # nobody asks for room(0): it is LIMIT
    assert {one.key[1:] for one in tally.survived} <= same
    assert not {one.key[1:] for one in tally.killed} & same
    assert tally.tried == 5
    assert tally.late == tally.timed_out == []
    assert tally.changes == len(mutations(TOY))


def test_time_up_on_a_cpu_is_a_verdict_and_time_up_by_the_clock_is_none(toy: Path) -> None:
    endless = TOY.replace("if taken < 0", "while taken < 0").replace("taken = 0", "pass")
    ended = {}
    with mutants.Runs(1, toy, toy / "verdicts") as runs:
        for cpu, seconds in ((4.0, 600.0), (600.0, 2.0)):  # only the other process runs into it
            one = runs.one(Trial("src/toy.py", endless, ("test_toy.py",), cpu, seconds))
            ended[one.ending] = (one.code, one.cpu > 4.0)
        (line,) = (toy / "verdicts").read_text().splitlines()
    assert ended == {"endless": (None, True), "late": (None, False)}
    assert json.loads(line)["ending"] == "endless"
    known = {end: Verdict(code, end, 0.0, 0.0, "") for end, code in (("late", None), ("stuck", None))}
    tally = mutants.Tally("src/toy.py", 2, 0.0)
    for one, verdict in zip(mutations(TOY), known.values(), strict=False):
        tally.count(one, verdict)
    assert (len(tally.late), len(tally.killed), len(tally.timed_out), tally.tried) == (1, 1, 1, 1)


def test_what_is_known_is_not_tried_again_while_the_tree_is_the_same(toy: Path) -> None:
    kept = toy / "verdicts"

    def tried(count: int) -> mutants.Tally:
        tree.cache_clear()
        with mutants.Runs(1, toy, kept) as runs:
            return mutants.judge(runs, toy, "src/toy.py", ("test_toy.py",), seed=3, count=count)

    first = tried(2)
    lines = kept.read_text().splitlines(keepends=True)
    assert len(lines) == 3  # the unchanged tests are one
    assert tried(2) == first
    assert kept.read_text().splitlines(keepends=True) == lines
    kept.write_text("".join(lines)[:-9])  # cut off while the last one was written
    assert tried(2).killed == first.killed
    assert len(kept.read_text().splitlines()) == 3
    (toy / "test_toy.py").write_text(TESTS + "\n")
    tried(1)
    assert len(kept.read_text().splitlines()) == 5


def test_equivalent_ones_are_not_counted() -> None:
    possible = mutations(TOY)
    known = {one.key for one in possible[:5]}
    for seed in range(5):
        worth, passed = mutants.draw(possible, known, seed, 4)
        assert len(worth) == 4
        assert not known & {one.key for one in worth}
        assert {one.key for one in passed} <= known
    assert mutants.draw(possible, known, 3, 4) == mutants.draw(possible, known, 3, 4)
    everything = mutants.draw(possible, known, 0, 1000)
    assert [len(part) for part in everything] == [len(possible) - 5, 5]


def test_every_equivalent_mutant_is_one_of_its_file() -> None:
    for path, judged in EQUIVALENT.items():
        known = {one.key for one in mutations((ROOT / path).read_text(encoding="utf-8"))}
        assert not judged.keys() - known, f"{path} has changed: judge these again"
