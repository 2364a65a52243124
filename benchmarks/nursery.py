"""A process that has imported torch already: it forks a child per mutant, which runs its file's tests.

Nothing on disk changes. The child, and every Python process its tests start, is served the changed text of
one module by a finder in front of the others. Esper itself is imported by the child only.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MEMORY = 12 * 2**30  # bytes of address space; a mutant that never stops appending ends here
STILL = (
    60.0,
    0.3,
)  # seconds of a clock in which tests that go on use more than so many of a CPU, on a busy machine too
WARM = ("numpy", "pydantic", "pytest", "safetensors", "torch", "torch.func", "torch.optim", "yaml")
SERVE = '''"""Serve one module from changed text."""
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import SourceFileLoader
from importlib.util import spec_from_file_location

MODULE, PATH, TEXT = {module!r}, {path!r}, {text!r}


class Changed(SourceFileLoader):
    def get_code(self, fullname):
        return compile(TEXT, PATH, "exec", dont_inherit=True)


class Finder(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        return spec_from_file_location(name, PATH, loader=Changed(name, PATH)) if name == MODULE else None


sys.meta_path.insert(0, Finder())
'''


class Ending(StrEnum):
    """Why a trial ended; only the last one is the machine's doing, and no verdict on the mutant."""

    ENDED = "ended"  # by itself
    ENDLESS = "endless"  # it used up its time on the CPU, which a busy machine does not make shorter
    STUCK = "stuck"  # nothing of it ran any more
    LATE = "late"  # by the clock


@dataclass(frozen=True)
class Trial:
    """One run of tests on one text of a module; behind either limit it is killed."""

    path: str  # of the module, below the root
    text: str
    tests: tuple[str, ...]
    cpu: float  # seconds on a CPU of all it starts
    seconds: float  # of a clock


@dataclass(frozen=True)
class Verdict:
    """How the tests ended: pytest's exit code, None where they did not end by themselves."""

    code: int | None
    ending: str
    cpu: float
    seconds: float
    said: str


class Nursery:
    """A warm process, on the parent's side; one trial at a time."""

    def __init__(self, root: Path = ROOT) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        here = str(Path(__file__).resolve())
        self.process = subprocess.Popen(
            [sys.executable, here, str(root)],
            cwd=root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, trial: Trial) -> Verdict:
        """Run one trial.

        Raises:
            RuntimeError: The process is gone.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(vars(trial)) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the nursery ended with {self.process.wait()}")
        return Verdict(**json.loads(answer))

    def close(self) -> None:
        self.process.communicate()  # its input ends, and so does it


def serve(root: Path) -> None:
    """Answer trials, a line of JSON each, until the input ends."""
    for name in WARM:
        __import__(name)
    for line in sys.stdin:
        print(json.dumps(vars(attempt(root, Trial(**json.loads(line))))), flush=True)


def attempt(root: Path, trial: Trial) -> Verdict:
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        module = ".".join(Path(trial.path).with_suffix("").parts[1:])  # below src/ or the like
        served = SERVE.format(module=module, path=str(root / trial.path), text=trial.text)
        (folder / "sitecustomize.py").write_text(served, encoding="utf-8")
        begun = time.perf_counter()
        child = os.fork()
        if child == 0:
            os._exit(run_tests(root, folder, trial))
        code, ending, cpu = wait(child, trial)
        lasted = time.perf_counter() - begun
        said = (folder / "said").read_text(encoding="utf-8", errors="replace")
        return Verdict(code, ending, cpu, lasted, said[-2000:])


def wait(child: int, trial: Trial) -> tuple[int | None, Ending, float]:
    """Return the child's exit code, why it ended and its time on the CPU; all it started is killed then."""
    begun = moved = looked = time.perf_counter()
    cpu = before = 0.0
    ending = None
    while ending is None:
        time.sleep(0.02)
        now = time.perf_counter()
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):  # its number stays taken
            ending = Ending.ENDED
        elif now - looked < 1.0:
            continue
        cpu, looked = max(cpu, cpu_of(child)), now
        if cpu - before > STILL[1]:
            before, moved = cpu, now
        if ending is None and cpu > trial.cpu:
            ending = Ending.ENDLESS
        elif ending is None and now - moved > STILL[0]:
            ending = Ending.STUCK
        elif ending is None and now - begun > trial.seconds:
            ending = Ending.LATE
    os.kill(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return (code if ending == Ending.ENDED else None), ending, cpu


def cpu_of(session: int) -> float:
    """Return the seconds on a CPU of a session's processes, and of those that they have waited for."""
    ticks = 0
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            fields = (entry / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == session:
                ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def run_tests(root: Path, folder: Path, trial: Trial) -> int:
    """Run pytest in the forked child, which is the first of its own session."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    out = os.open(folder / "said", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(out, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    paths = [str(folder), str(root / Path(trial.path).parts[0])]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*paths, os.environ.get("PYTHONPATH")]))
    sys.path[:0] = paths
    try:
        exec(compile((folder / "sitecustomize.py").read_text(encoding="utf-8"), "sitecustomize", "exec"), {})
        import pytest

        rules = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", f"--basetemp={folder / 'tests'}"]
        return int(pytest.main([*rules, *trial.tests]))
    except BaseException as error:  # whatever a mutant raises, the nursery's own code must not go on here
        print(repr(error))
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
