"""Docs cannot drift: snippets run, generated pages are fresh, links lead somewhere, claims repeat."""

import datetime
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from esper.kasmina.seeds.state import MOVES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
# A page that needs more than it shows sets it up in a comment: <!-- setup … -->
SNIPPET = re.compile(r"^(?:```python|<!-- setup)\n(?P<code>.*?)^(?:```|-->)$", re.MULTILINE | re.DOTALL)
WITH_SNIPPETS = [page for page in PAGES if SNIPPET.search(page.read_text(encoding="utf-8"))]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(page: Path) -> str:
    """The snippets of a page as one program; each stands on the line it has in the page."""
    text = page.read_text(encoding="utf-8")
    lines: list[str] = []
    for match in SNIPPET.finditer(text):
        lines += [""] * (text.count("\n", 0, match.start("code")) - len(lines))
        lines += match["code"].splitlines()
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=lambda page: page.name)
def test_snippets_run(page: Path, tmp_path: Path) -> None:
    program = tmp_path / f"{page.stem}.py"
    program.write_text(script(page), encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, "-W", "error", program.name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


def test_the_first_pages_have_snippets() -> None:
    assert {"README.md", "quickstart.md"} <= {page.name for page in WITH_SNIPPETS}


@pytest.mark.parametrize("name", ["settings.md", "cli.md", "errors.md", "optimizers.md"])
def test_generated_pages_are_fresh(name: str) -> None:
    generate = generator()
    written = (DOCS / name).read_text(encoding="utf-8")
    assert written == generate.NOTE + generate.PAGES[name](), "run: .venv/bin/python docs/generate.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_the_table_of_a_seeds_life_is_the_one_in_the_code() -> None:
    rows = re.findall(r"^\| ([A-Z_, ]+) \| ([A-Z_]+) \|", (DOCS / "how-it-grows.md").read_text("utf-8"), re.M)
    shown = {(source, target) for sources, target in rows for source in sources.split(", ")}
    assert shown == {(source.name, target.name) for source, targets in MOVES.items() for target in targets}


def test_every_claim_can_be_repeated() -> None:
    rows = [line for line in (DOCS / "claims.md").read_text("utf-8").splitlines() if line.startswith("|")]
    assert rows[0] == "| claim | value | command | date |"
    assert rows[2:], "no claim yet"
    for row in rows[2:]:
        claim, value, command, date = (cell.strip() for cell in row.strip("|").split("|"))
        assert claim
        assert re.search(r"\d", value), row
        assert re.fullmatch(r"`(make|esper|pytest|python) .+`", command), row
        assert datetime.date.fromisoformat(date).year >= 2026, row
