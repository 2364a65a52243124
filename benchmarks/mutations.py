"""All small changes of one file: what a mutant may be, as edits of its text."""

from __future__ import annotations

import ast
import re
from collections import Counter
from dataclasses import dataclass
from typing import cast

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {  # the boundary, then the opposite
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
TWINS = {"min": "max", "max": "min", "any": "all", "all": "any"}
LOGGING = ("logger", "logging", "log")


@dataclass(frozen=True)
class Mutation:
    """One edit of a file's text."""

    line: int  # from 1
    within: str  # the function or class, dotted; empty for the module
    text: str  # the line, stripped
    change: str  # "old → new", white space made one; " (2)" behind the second such change of one line
    start: int  # bytes from the beginning
    end: int
    new: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What names this change also where lines have moved."""
        return self.within, self.text, self.change

    def apply(self, source: str) -> str:
        content = source.encode()
        return (content[: self.start] + self.new.encode() + content[self.end :]).decode()


def mutations(source: str) -> list[Mutation]:
    """List the changes of a file, in the order of its text."""
    finder = _Finder(source)
    finder.visit(ast.parse(source))
    found = []
    seen: Counter[tuple[str, str, str]] = Counter()
    for one in sorted(finder.found, key=lambda m: (m.start, m.end, m.new)):
        seen[one.key] += 1
        again = f" ({seen[one.key]})" if seen[one.key] > 1 else ""
        found.append(
            Mutation(one.line, one.within, one.text, one.change + again, one.start, one.end, one.new)
        )
    return found


class _Finder(ast.NodeVisitor):
    """Walk a tree; annotations, decorators, strings and what an error says are left as they are."""

    def __init__(self, source: str) -> None:
        self.content = source.encode()
        self.lines = source.splitlines()
        self.starts = [0]
        for line in self.content.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.found: list[Mutation] = []
        self.within: list[str] = []

    def propose(self, node: ast.stmt | ast.expr, new: str) -> None:
        start = self.starts[node.lineno - 1] + node.col_offset
        end = self.starts[cast("int", node.end_lineno) - 1] + cast("int", node.end_col_offset)
        old = re.sub(r"\s+", " ", self.content[start:end].decode())
        text = self.lines[node.lineno - 1].strip()
        change = f"{old} → {new}"
        self.found.append(Mutation(node.lineno, ".".join(self.within), text, change, start, end, new))

    def swap(self, node: ast.expr, new: ast.expr) -> None:
        self.propose(node, f"({ast.unparse(new)})")

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        self.within.append(node.name)
        if not isinstance(node, ast.ClassDef):
            for default in (*node.args.defaults, *node.args.kw_defaults):
                if default is not None:
                    self.visit(default)
        for statement in node.body:
            self.visit(statement)
        self.within.pop()

    visit_AsyncFunctionDef = visit_ClassDef = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) == "TYPE_CHECKING":
            return
        self.condition(node.test)
        if not node.orelse and len(node.body) == 1 and isinstance(node.body[0], ast.Raise):
            self.visit(node.test)  # the raise removed is the condition made false
        else:
            self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.condition(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self.propose(node.test, "False")
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self.condition(test)
        self.generic_visit(node)

    def condition(self, test: ast.expr) -> None:
        """Force a condition both ways, unless what it binds is needed behind it."""
        if not any(isinstance(part, ast.NamedExpr) for part in ast.walk(test)):
            self.propose(test, "True")
            self.propose(test, "False")

    def visit_Compare(self, node: ast.Compare) -> None:
        for place, operator in enumerate(node.ops):
            for other in COMPARISONS[type(operator)]:
                ops = [*node.ops[:place], other(), *node.ops[place + 1 :]]
                self.swap(node, ast.Compare(node.left, ops, node.comparators))
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.swap(node, ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not | ast.USub):
            self.swap(node, node.operand)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        other = OPERATORS.get(type(node.op))
        if other is not None and not any(map(_is_text, (node.left, node.right))):
            self.swap(node, ast.BinOp(node.left, other(), node.right))
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if other := OPERATORS.get(type(node.op)):
            self.propose(node, ast.unparse(ast.AugAssign(node.target, other(), node.value)))
        self.removed_if_kept(node, [node.target])
        self.visit(node.value)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.propose(node, str(not value))
        elif isinstance(value, int | float):
            self.propose(node, repr(value + 1))
            if value:
                self.propose(node, "0")

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self.propose(node.value, "None")
            self.visit(node.value)

    def visit_Raise(self, node: ast.Raise) -> None:
        self.propose(node, "pass")

    def visit_Expr(self, node: ast.Expr) -> None:
        called = node.value
        if isinstance(called, ast.Call) and ast.unparse(called.func).split(".")[0] not in LOGGING:
            self.propose(node, "pass")
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        names = {target.id for target in node.targets if isinstance(target, ast.Name)}
        if "__all__" in names or (not self.within and _only_names(node.value)):
            return  # what a module gives to others, and names of types
        self.removed_if_kept(node, node.targets)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.removed_if_kept(node, [node.target])
            self.visit(node.value)

    def removed_if_kept(self, node: ast.stmt, targets: list[ast.expr]) -> None:
        """Remove what is written into an object; without a local name the next line would only fail."""
        if all(isinstance(target, ast.Attribute | ast.Subscript) for target in targets):
            self.propose(node, "pass")

    def visit_Delete(self, node: ast.Delete) -> None:
        self.propose(node, "pass")

    def visit_Break(self, node: ast.Break) -> None:
        self.propose(node, "continue")

    def visit_Continue(self, node: ast.Continue) -> None:
        self.propose(node, "break")

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load) and node.id in TWINS:
            self.propose(node, TWINS[node.id])

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Leave text as it is."""


def _is_text(value: ast.expr) -> bool:
    return isinstance(value, ast.JoinedStr) or (
        isinstance(value, ast.Constant) and isinstance(value.value, str | bytes)
    )


def _only_names(value: ast.expr) -> bool:
    """Tell whether an expression is a type's other name, such as ``A | B`` or ``dict[str, A]``."""
    if isinstance(value, ast.BinOp):
        return isinstance(value.op, ast.BitOr) and _only_names(value.left) and _only_names(value.right)
    return isinstance(value, ast.Name | ast.Attribute | ast.Subscript)
