"""What linters cannot hold: where imports and tests stand, sizes, names, errors, what --help costs."""

import ast
import graphlib
import os
import re
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "esper"
VERBS = {
    "kasmina": "grows",
    "tamiyo": "decides",
    "tezzeret": "compiles",
    "urza": "keeps",
    "tolaria": "trains",
    "nissa": "watches",
}
VAGUE = re.compile(r"(^|_)(utils?|helpers?|manager|misc|common|enhanced|stuff|v2|impl)(_|$)", re.I)
ALLOWED_NAMES = {"CheckpointManager"}  # a name of the founding documents
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
FOREIGN_ERRORS = {
    "ArithmeticError",
    "AssertionError",
    "Exception",
    "ImportError",
    "IndexError",
    "KeyError",
    "LookupError",
    "NotImplementedError",
    "OSError",
    "RuntimeError",
    "TypeError",
    "ValueError",
}

# Rooms in which ``Any`` is counted, and how many a thousand lines may hold; "": the files beside the rooms.
COUNTED = (
    "batches blueprints cli integrations kasmina nissa saving surgery tamiyo testing tezzeret urza".split()
)
ANY_LIMITS = dict.fromkeys(("", *COUNTED, "tolaria/growth"), 5.0)
ANY_APART = {
    "cli/application.py": "overrides typer's own copy of click, whose types are private",
    "integrations/ray/forge.py": "Ray has no types, and what travels are plain values",
    "saving/rebuild_template.py": "reads a save with torch alone: a codec",
    "surgery/isolation/draws.py": "torch dispatches calls to it, whose arguments have no types",
    "tezzeret/container.py": "reads a manifest: a codec",
    "yaml_text.py": "overrides PyYAML's composer, whose types are wrong: a codec",
}


# Private names of torch stand in files called ``private_api.py``, which demand them before use, and here.
PYTREE = "torch's walk over nested batches, whose public twin is younger than torch 2.11"
MODES = "TorchDispatchMode is documented for this and has no public address"
NORMS = "the base class of all batch and instance norms, which has no public name"
ASSERT = "torch's own assert, which a model holds where nothing but torch is installed"
PRIVATE_TORCH = {
    "batches/layout.py": PYTREE,
    "kasmina/branches/blocks.py": NORMS,
    "kasmina/depth/birth.py": NORMS,
    "kasmina/depth/stacks.py": PYTREE,
    "kasmina/evidence/sight.py": NORMS,
    "kasmina/recording/between.py": PYTREE,
    "kasmina/recording/flops.py": MODES,
    "kasmina/recording/fused.py": "the type of torch's operators, in annotations only",
    "kasmina/recording/recorder.py": PYTREE,
    "kasmina/recording/regions.py": PYTREE,
    "kasmina/recording/scalars.py": PYTREE,
    "kasmina/recording/visits.py": PYTREE,
    "kasmina/recording/weightless.py": NORMS,
    "kasmina/seeds/compiler_settings.py": "settings of Dynamo, by the names its manual gives",
    "kasmina/seeds/compiling.py": "what Dynamo has compiled of a host, each name asked for where it is used",
    "saving/pretrained.py": PYTREE,
    "saving/rebuild_template.py": ASSERT,
    "surgery/branches.py": ASSERT,
    "surgery/isolation/contexts.py": NORMS,
    "surgery/isolation/draws.py": MODES,
    "surgery/isolation/seam.py": PYTREE,
    "tezzeret/pipelines/aoti.py": "the packaging calls of AOTInductor, as torch's own manual imports them",
    "tezzeret/pipelines/inductor.py": "the compiler's settings, as torch's own manual imports them",
    "tolaria/growth/assembly.py": NORMS,
}


@dataclass(frozen=True)
class Source:
    """One file of the package, read and parsed once."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(SRC).as_posix()

    @property
    def room(self) -> str:
        return self.path.relative_to(SRC).parts[0].removesuffix(".py")

    @property
    def house(self) -> str:
        """The room as a folder, Tolaria's own rooms apart; "" for a file beside them."""
        folders = self.name.split("/")[:-1]
        return "/".join(folders[:2]) if self.room == "tolaria" else "/".join(folders[:1])

    @cached_property
    def lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").splitlines()

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(ast.parse("\n".join(self.lines), str(self.path))))

    def comments(self) -> Iterator[str]:
        with tokenize.open(self.path) as file:
            for token in tokenize.generate_tokens(file.readline):
                if token.type == tokenize.COMMENT:
                    yield token.string


SOURCES = [Source(path) for path in sorted(SRC.rglob("*.py"))]


def offenders(rule: Callable[[Source], object]) -> dict[str, object]:
    """What the rule finds wrong, by file."""
    return {source.name: wrong for source in SOURCES if (wrong := rule(source))}


def imports(node: ast.AST) -> list[str]:
    """The dotted names an import statement asks for; none for any other node."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return ["." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names]
    return []


def test_files_stay_readable() -> None:
    assert offenders(lambda source: len(source.lines) > 400) == {}


# Folders of fewer than 4 or more than 15 files, and why.
OTHER_SIZES = {
    "blueprints/catalogue": "a registry: one file each",
    "distributed/wrappings": "a registry: one file each",
    "integrations": "its files stand in a folder per product",
    "integrations/ray": "one file each for what Ray may run: the forge, training",
    "kasmina": "MorphableModel and its summary, over nine folders",
    "nissa": "how numbers read, for run/ and views/ alike",
    "surgery": "what changes layers, beside isolation/ and optimizers/",
    "tolaria": "the trainer, over growth/ and governor/",
    "tolaria/growth/incubation": "the second recipe; most of what it does is in kasmina/race",
    "urza": "the store of kernels; the repository is to come",
    "nissa/detectors": "a registry: one file each",
    "urza/blobs": "a registry: one file each",
}


def test_folders_hold_what_a_reader_can_keep_in_mind() -> None:
    files: dict[str, int] = {}
    for source in SOURCES:
        folder = source.path.parent.relative_to(SRC).as_posix()
        files[folder] = files.get(folder, 0) + (source.path.name != "__init__.py")
    odd = {folder for folder, count in files.items() if not 4 <= count <= 15}
    assert odd == OTHER_SIZES.keys()


# Folders of tests that are no room's, and what they hold.
APART = {
    "attacks": "what a hostile or careless user does, across the rooms",
    "benchmarks": "the benches beside the package",
    "cases": "faults that were found, by their kind, each seen through the public names",
    "examples": "the programs of examples/",
    "integration": "whole paths through several rooms",
}


def test_tests_lie_where_what_they_test_lies() -> None:
    tests = SRC.parent.parent / "tests"
    folders = {path.parent.relative_to(tests).as_posix() for path in tests.rglob("test_*.py")} - {"."}
    assert {folder for folder in folders if not (SRC / folder).is_dir()} == APART.keys()


def test_no_files_import_each_other_round_a_circle() -> None:
    """Packages may, as tezzeret and its pipelines; files never do, but for types."""

    def dotted(source: Source) -> str:
        return source.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    known, asked = set(map(dotted, SOURCES)), dict[str, set[str]]()
    for source in SOURCES:
        tops = [node for node in ast.parse("\n".join(source.lines)).body if isinstance(node, ast.ImportFrom)]
        names = [name.removeprefix("esper.") for node in tops for name in imports(node)]
        asked[dotted(source)] = {n if n in known else n.rpartition(".")[0] for n in names} & known
    order = list(graphlib.TopologicalSorter(asked).static_order())  # a circle raises, and is named
    assert len(order) == len(known) > 100


def test_no_import_hides_in_a_function() -> None:
    """Commands import what they run; registry.py and __init__.py go through importlib, so they pass too."""

    def hidden(source: Source) -> list[str]:
        functions = [
            node for node in source.nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        return [name for function in functions for node in ast.walk(function) for name in imports(node)]

    assert offenders(lambda source: source.room != "cli" and hidden(source)) == {}


def anys(node: ast.AST) -> int:
    return sum(isinstance(one, ast.Name) and one.id == "Any" for one in ast.walk(node))


@pytest.mark.parametrize("room", ANY_LIMITS)
def test_any_is_rare(room: str) -> None:
    counted = [source for source in SOURCES if source.house == room and source.name not in ANY_APART]
    found = {source.name: many for source in counted if (many := sum(map(anys, source.nodes[:1])))}
    lines = sum(len(source.lines) for source in counted)
    assert sum(found.values()) <= ANY_LIMITS[room] * lines / 1000, found


def test_no_parameter_is_any() -> None:
    def loose(source: Source) -> list[str]:
        arguments = [node for node in source.nodes if isinstance(node, ast.arg) and node.annotation]
        return [node.arg for node in arguments if node.annotation is not None and anys(node.annotation)]

    counted = [source for source in SOURCES if source.house in ANY_LIMITS and source.name not in ANY_APART]
    assert {source.name: wrong for source in counted if (wrong := loose(source))} == {}


def test_no_room_is_imported_for_its_types_only() -> None:
    def crossing(source: Source) -> list[str]:
        branches = [
            node
            for node in source.nodes
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ]
        names = [name for branch in branches for node in ast.walk(branch) for name in imports(node)]
        return [name for name in names if name.startswith("esper.") and name.split(".")[1] != source.room]

    # The public surface names its homes for editors; test_public_api holds it.
    assert offenders(lambda source: source.name != "__init__.py" and crossing(source)) == {}


def test_imports_are_absolute() -> None:
    assert offenders(lambda s: [name for node in s.nodes for name in imports(node) if name[0] == "."]) == {}


def test_names_say_what_things_are() -> None:
    def vague(source: Source) -> set[str]:
        definitions = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        names = {node.name for node in source.nodes if isinstance(node, definitions)}
        names |= {*source.name.removesuffix(".py").split("/")}
        apart = {name: re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name) for name in names - ALLOWED_NAMES}
        return {name for name, words in apart.items() if VAGUE.search(words)}

    assert offenders(vague) == {}


def test_no_code_is_run_from_data() -> None:
    def unsafe(source: Source) -> set[str]:
        calls = {ast.unparse(node.func) for node in source.nodes if isinstance(node, ast.Call)}
        modules = {name.split(".")[0] for node in source.nodes for name in imports(node)}
        return calls & UNSAFE_CALLS | modules & UNSAFE_MODULES

    assert offenders(unsafe) == {}


def test_torch_load_reads_weights_only() -> None:
    def loads(source: Source) -> list[str]:
        calls = [ast.unparse(node) for node in source.nodes if isinstance(node, ast.Call)]
        return [call for call in calls if call.startswith("torch.load(") and "weights_only=True" not in call]

    assert offenders(loads) == {}


def private_of_torch(node: ast.AST) -> list[str]:
    """The private names of torch that a node imports or reaches through ``torch`` itself."""
    dotted = [ast.unparse(node)] if isinstance(node, ast.Attribute) else imports(node)
    parts = [name.split(".") for name in dotted if name.split(".")[0] == "torch"]
    return [".".join(p) for p in parts if any(re.match("_(?!_)", part) for part in p)]


def test_private_torch_stands_in_files_named_for_it() -> None:
    def reached(source: Source) -> list[str]:
        return [name for node in source.nodes for name in private_of_torch(node)]

    apart = offenders(lambda source: source.path.name != "private_api.py" and reached(source))
    assert apart.keys() == PRIVATE_TORCH.keys(), apart


def test_files_of_private_torch_demand_what_they_use() -> None:
    """Not torch's fault alone: a file that uses private names and asks for none says nothing when they go."""

    def silent(source: Source) -> bool:
        calls = {ast.unparse(node.func) for node in source.nodes if isinstance(node, ast.Call)}
        return source.path.name == "private_api.py" and "demand" not in calls

    assert offenders(silent) == {}


def test_nothing_catches_everything_without_saying_why() -> None:
    """A kernel may raise anything, so one broad except is right; its reason stands on its line."""

    def broad(source: Source) -> list[str]:
        handlers = [node for node in source.nodes if isinstance(node, ast.ExceptHandler)]
        caught = {node.lineno: ast.unparse(node.type) if node.type else "Exception" for node in handlers}
        wide = [number for number, name in caught.items() if re.search(r"\b(Base)?Exception\b", name)]
        return [source.lines[number - 1] for number in wide if "#" not in source.lines[number - 1]]

    assert offenders(broad) == {}


def test_what_is_raised_is_of_our_tree() -> None:
    """A bare NotImplementedError marks an abstract method."""
    apart = {"contracts.py", "saving/rebuild_template.py"}  # guards against ourselves; runs without Esper

    def foreign(source: Source) -> list[str]:
        raised = [node.exc for node in source.nodes if isinstance(node, ast.Raise)]
        calls = [node for node in raised if isinstance(node, ast.Call)]
        return [ast.unparse(call) for call in calls if ast.unparse(call.func) in FOREIGN_ERRORS]

    assert offenders(lambda source: source.name not in apart and foreign(source)) == {}


def test_nothing_is_left_for_later() -> None:
    later = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    assert offenders(lambda source: [text for text in source.comments() if later.search(text)]) == {}


def test_every_noun_of_the_contracts_is_shared() -> None:
    """What one room needs alone lives in that room."""
    contracts = next(source for source in SOURCES if source.name == "contracts.py")
    users: dict[str, set[str]] = {
        node.name: set() for node in contracts.nodes if isinstance(node, ast.ClassDef)
    }
    for source in SOURCES:
        for name in [name for node in source.nodes for name in imports(node)]:
            module, _, noun = name.rpartition(".")
            if module == "esper.contracts" and noun in users:
                users[noun].add(source.room)
    assert {noun: rooms for noun, rooms in users.items() if len(rooms) < 2} == {}


def test_every_room_is_introduced_by_its_verb() -> None:
    for room, verb in VERBS.items():
        door = SRC / room / "__init__.py"
        if door.parent.is_dir():
            assert door.read_text(encoding="utf-8").startswith(f'"""{room.title()} {verb}'), room


HELP = """
import resource, sys
from esper.cli import app
try:
    app(["--help"], prog_name="esper")
except SystemExit as end:
    assert not end.code, end.code
"""


def run(code: str) -> str:
    """Run Python without coverage's start-up hook; return the last line it prints."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()[-1]


def test_help_imports_nothing_heavy() -> None:
    heavy = "('torch', 'sklearn', 'scipy', 'matplotlib', 'pandas')"
    assert run(HELP + f"print('loaded:', *(name for name in {heavy} if name in sys.modules))") == "loaded:"


@pytest.mark.slow
def test_help_costs_at_most_400_ms_of_cpu() -> None:
    seconds = [
        float(run(HELP + "print(resource.getrusage(resource.RUSAGE_SELF).ru_utime)")) for _ in range(5)
    ]
    assert statistics.median(seconds) <= 0.4, seconds
