"""What nobody reaches goes: every public function and method is called or named by the package or its pages.

Names are looked up in the syntax tree, so a method counts as reached where any attribute of its name is read;
a function counts only where its own module names it, or another one imports it or asks its module for it.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator

from tests.test_architecture import SOURCES, SRC, Source

ROOT = SRC.parent.parent
# A name in code of a page, a call in an example or a bench, a name in a template: reached by people.
SPOKEN = re.compile(r"`[^`\n]*`|\b\w+(?=\()|\.\w+")
PAGES = (
    "README.md",
    "docs/**/*.md",
    "docs/**/*.py",
    "examples/**/*.py",
    "examples/**/*.yaml",
    "benchmarks/**/*.py",
)
ALLOWED = {
    "config.Config.settings_customise_sources": "pydantic-settings calls it",
    "urza.blobs.s3.Joined.readinto": "io.RawIOBase calls it",
    "urza.blobs.s3.Joined.seekable": "botocore asks before it sends a body again",
    "yaml_text._Loader.compose_mapping_node": "PyYAML calls it",
    "yaml_text._Loader.compose_node": "PyYAML calls it",
}
Definition = ast.FunctionDef | ast.AsyncFunctionDef


def dotted(source: Source) -> str:
    """Name the module of a file, below ``esper``."""
    return source.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def words(node: ast.AST) -> Iterator[str]:
    """Every name a piece of code reads: a variable, an attribute, a part of a text that is a dotted path."""
    for one in ast.walk(node):
        if isinstance(one, ast.Name):
            yield one.id
        elif isinstance(one, ast.Attribute):
            yield one.attr
        elif isinstance(one, ast.Constant) and isinstance(one.value, str):
            yield from re.findall(r"\w+", one.value) if re.fullmatch(r"[\w.:]+", one.value) else ()


def spoken() -> set[str]:
    """Names that pages, examples, benches and templates use."""
    pages = [page for pattern in PAGES for page in ROOT.glob(pattern)] + [*SRC.rglob("*.html")]
    texts = [found for page in pages for found in SPOKEN.findall(page.read_text(encoding="utf-8"))]
    return {word for text in texts for word in re.findall(r"[A-Za-z_]\w*", text)}


def listed(module: ast.Module) -> set[str]:
    """What a module offers by ``__all__``."""
    offers = [
        node.value
        for node in module.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    return {word for value in offers for word in words(value)}


def registered(node: Definition | ast.ClassDef) -> bool:
    """Whether a decorator hands it on, as ``@app.command()`` and ``@field_validator`` do."""
    own = {"property", "classmethod", "staticmethod", "contextmanager", "asynccontextmanager", "override"}
    names = {ast.unparse(one).split("(")[0].rpartition(".")[2] for one in node.decorator_list}
    return bool(
        names - own - {"cached_property", "cache", "lru_cache", "no_grad", "dataclass", "total_ordering"}
    )


def asked() -> set[tuple[str, str]]:
    """Names that a file imports from a module or reads off one, with the module."""
    found: set[tuple[str, str]] = set()
    for source in SOURCES:
        known: dict[str, str] = {}
        for node in source.nodes:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "esper":
                module = node.module.removeprefix("esper").lstrip(".")
                found |= {(module, alias.name) for alias in node.names}
                known |= {one.asname or one.name: f"{module}.{one.name}".lstrip(".") for one in node.names}
        for node in source.nodes:
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in known
            ):
                found.add((known[node.value.id], node.attr))
    return found


def public(body: list[ast.stmt]) -> list[Definition]:
    """Functions or methods that anybody may call, but for those a decorator hands on."""
    found = [node for node in body if isinstance(node, Definition)]
    return [node for node in found if not node.name.startswith("_") and not registered(node)]


def unreached() -> set[str]:
    """Public functions and methods that nothing of the package, its pages, examples and benches names."""
    modules = {source: ast.parse("\n".join(source.lines)) for source in SOURCES}
    texts = {
        word
        for module in modules.values()
        for node in ast.walk(module)
        if isinstance(node, ast.Constant)
        for word in words(node)
    }
    everywhere = Counter(word for module in modules.values() for word in words(module))
    people, wanted, found = spoken(), asked(), set[str]()
    for source, module in modules.items():
        here, told = Counter(words(module)), listed(module) | people | texts
        for node in public(module.body):
            elsewhere = here[node.name] > Counter(words(node))[node.name]
            if not elsewhere and node.name not in told and (dotted(source), node.name) not in wanted:
                found.add(f"{dotted(source)}.{node.name}")
        for one in [node for node in module.body if isinstance(node, ast.ClassDef)]:
            if any("Protocol" in ast.unparse(base) for base in one.bases):
                continue
            for method in public(one.body):
                within = Counter(words(method))[method.name]
                if everywhere[method.name] <= within and method.name not in people:
                    found.add(f"{dotted(source)}.{one.name}.{method.name}")
    return found


def test_what_nobody_reaches_goes() -> None:
    assert unreached() - ALLOWED.keys() == set()


def test_what_is_allowed_is_there_and_not_reached() -> None:
    assert ALLOWED.keys() - unreached() == set()
