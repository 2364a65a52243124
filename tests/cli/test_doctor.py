import json
import subprocess
import sys
from importlib import metadata

import torch

from esper.cli import doctor


def test_it_names_every_requirement_with_the_version_that_is_installed(esper) -> None:
    found = json.loads(esper("doctor", "--json").stdout)
    assert found["complete"] is True
    assert found["core"]["torch"] == metadata.version("torch")
    assert found["torch"]["version"] == torch.__version__
    assert found["extras"]["report"]["packages"]["matplotlib"] == metadata.version("matplotlib")
    assert set(metadata.metadata("esper-morph").get_all("Provides-Extra")) == found["extras"].keys()


def test_an_extra_that_asks_for_another_holds_its_packages() -> None:
    needs = doctor.requirements()
    assert needs["report"] <= needs["demo"] <= needs["all"]


def test_what_is_missing_comes_with_the_line_that_installs_it() -> None:
    """A requirement nobody has: the distribution's metadata says so, and doctor believes it."""
    code = (
        "from importlib import metadata\n"
        "from esper.cli import doctor\n"
        "real = metadata.requires\n"
        "metadata.requires = lambda name: [*real(name), 'no-such-core', "
        "'no-such-extra>=1; extra == \"report\"']\n"
        "found = doctor.examine()\n"
        "doctor.print_examination(found)\n"
        "assert found['complete'] is False\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "MISSING: pip install no-such-core" in ran.stdout
    assert "extra report: missing, get it with: pip install 'esper-morph[report]'" in ran.stdout


def test_people_read_lines(esper) -> None:
    ran = esper("doctor")
    assert ran.returncode == 0
    assert "torch" in ran.stdout
    assert "extra report: present" in ran.stdout
