"""How long does a user wait before the command says anything?"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import compare, harness
from benchmarks.promises import Promise

NAME = "cli-start"
REPEATS = 7


def main(argv: Sequence[str]) -> int:
    """Measure CPU seconds (user and system) of fresh processes, in turns; the medians are reported."""
    chosen = harness.options(NAME, __doc__, argv, seeds=REPEATS)
    script = Path(sys.executable).with_name("esper")
    command = [str(script)] if script.exists() else [sys.executable, "-m", "esper"]
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import esper": [sys.executable, "-c", "import esper"],
        "esper --help": [*command, "--help"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for line in commands.values():
        cpu_seconds(line)  # once unmeasured: bytecode and file cache
    for _ in range(chosen.seeds):
        for name, line in commands.items():
            seconds[name].append(cpu_seconds(line))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    table = compare.titled(f"CPU seconds, median of {chosen.seeds}", ["command", "median", "least", "most"])
    for name, values in seconds.items():
        table.add_row(name, *(f"{value:.3f}" for value in (medians[name], min(values), max(values))))
    judged = [Promise("esper --help: CPU seconds", medians["esper --help"], "<=", 0.4, digits=3)]
    return harness.conclude(NAME, chosen, [table], judged, {"seconds": seconds, "medians": medians})


def cpu_seconds(command: Sequence[str]) -> float:
    """Run one command; return the CPU time the system charged to it.

    Raises:
        subprocess.CalledProcessError: It failed.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command))
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
