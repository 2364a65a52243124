import subprocess
import sys
from importlib import metadata

import pytest

from esper.cli.application import exit_code
from esper.errors import ConfigError, EsperError, MissingExtraError, RegistryError, RunError, SurgeryError

COMMANDS = ("demo", "train", "report", "why", "bench", "doctor")


def test_help_lists_the_commands_and_the_exit_codes(esper) -> None:
    ran = esper("--help")
    assert ran.returncode == 0
    assert all(command in ran.stdout for command in COMMANDS)
    assert "Exit codes: 0 all is well; 1 what was asked for failed" in ran.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(esper, command: str) -> None:
    ran = esper(command, "--help")
    assert ran.returncode == 0
    assert f"esper {command}" in ran.stdout


def test_the_installed_command_is_the_module() -> None:
    script = [f"{sys.prefix}/bin/esper", "--help"]
    assert subprocess.run(script, capture_output=True, check=False).returncode == 0


def test_the_version_is_the_installed_one(esper) -> None:
    ran = esper("--version")
    assert (ran.returncode, ran.stdout) == (0, f"esper {metadata.version('esper-morph')}\n")


def test_an_unknown_command_is_bad_input(esper) -> None:
    ran = esper("trains")
    assert ran.returncode == 2
    assert "train" in ran.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError(""), 2),
        (RunError(""), 2),
        (RegistryError(""), 2),
        (SurgeryError(""), 1),
        (MissingExtraError("a", "b", "c"), 3),
    ],
)
def test_exit_codes_tell_mistakes_from_failures(error: EsperError, code: int) -> None:
    assert exit_code(error) == code


def test_a_missing_extra_ends_with_its_pip_line_and_code_3(run) -> None:
    code = "import sys; sys.modules['matplotlib'] = None; from esper.cli import main; main()"
    line = [sys.executable, "-c", code, "report", str(run)]
    ran = subprocess.run(line, capture_output=True, text=True, check=False)
    assert ran.returncode == 3
    assert ran.stderr.strip() == (
        "esper: drawing a run's pictures needs matplotlib; install it with: pip install 'esper-morph[report]'"
    )
