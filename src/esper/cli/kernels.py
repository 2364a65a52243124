"""``esper kernels``: what a store of kernels holds, and whether its containers are sound."""

from __future__ import annotations

import json as text
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

import typer

from esper.cli.application import FAILED
from esper.cli.output import print_json, say
from esper.contracts import Kernel
from esper.errors import KernelError
from esper.printable import printable
from esper.tezzeret.container import is_published, open_sealed
from esper.tezzeret.contents import tensor_table
from esper.tezzeret.signing import load_key
from esper.urza.folder import FolderStore, default_folder

kernels = typer.Typer(
    help="List, show and verify the kernels that were compiled and kept; the key is $ESPER_KERNEL_KEY, or "
    "~/.local/share/esper/kernel.key.",
    no_args_is_help=True,
)
Store = Annotated[
    Path | None,
    typer.Option(help="Their folder; $ESPER_KERNEL_STORE, or ~/.local/share/esper/kernels, by default."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SHORT = 12  # digits of an id in a table; 2⁴⁸ kernels would have to meet before two look alike


class Row(TypedDict):
    """A kernel as lists print it; of a refused one nothing is known but why."""

    id: str
    refused: str | None
    blueprint: NotRequired[str | None]
    layout: NotRequired[str]
    port: NotRequired[str]
    inputs: NotRequired[int]
    outputs: NotRequired[int]
    hidden: NotRequired[int]
    seed: NotRequired[int]
    published: NotRequired[bool]
    pipeline: NotRequired[str]
    variants: NotRequired[dict[str, int]]  # bytes of each
    toolchain: NotRequired[str]
    tensors: NotRequired[int]
    weight_bytes: NotRequired[int]


@kernels.command("list")
def list_kernels(store: Store = None, json: Json = False) -> None:
    """List the kernels of a store; one that is refused is listed with the reason."""
    shelf = FolderStore(store or default_folder())
    ids = shelf.ids()
    key = load_key(store=shelf.folder) if ids else b""
    rows = [examine(shelf, one, key) for one in ids]
    if json:
        print_json(rows)
    elif rows:
        print_table(rows)
    else:
        say(f"no kernels in {shelf.folder}")


@kernels.command()
def show(
    kernel: Annotated[str, typer.Argument(help="A kernel's id, or how it starts.")],
    store: Store = None,
    json: Json = False,
) -> None:
    """Show one kernel: what it is made from, its tensors, compiled forms and verification."""
    shelf = FolderStore(store or default_folder())
    found = opened(shelf, find(shelf, kernel), load_key(store=shelf.folder))
    facts = {
        **describe(found),
        "weights": {
            name: {"dtype": dtype, "shape": list(shape)}
            for name, (dtype, shape) in tensor_table(found.weights, "weights").items()
        },
        "report": dict(found.report),
        "graph": text.loads(found.graph),
    }
    if json:
        print_json(facts)
        return
    for name, value in facts.items():
        line = value if isinstance(value, str) else text.dumps(value, ensure_ascii=False)
        say(f"{name:<12} {printable(line, keep='')}")


@kernels.command()
def verify(
    ids: Annotated[list[str] | None, typer.Argument(help="Kernels' ids, or how they start.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every kernel of the store.")] = False,
    store: Store = None,
    json: Json = False,
) -> None:
    """Check containers: sizes, digest, signature, then contents; one line per refused one, and exit 1."""
    shelf = FolderStore(store or default_folder())
    if bool(ids) == everything:
        raise typer.BadParameter("name kernels, or give --all")
    wanted = shelf.ids() if everything else [find(shelf, one) for one in ids or ()]
    key = load_key(store=shelf.folder) if wanted else b""
    checked = [examine(shelf, one, key) for one in wanted]
    refused = {row["id"]: row["refused"] for row in checked if row["refused"] is not None}
    if json:
        print_json({"verified": [one for one in wanted if one not in refused], "refused": refused})
    else:
        for one, reason in refused.items():
            say(f"{one}: {reason}")
        say(f"{len(wanted) - len(refused)} of {len(wanted)} kernels in {shelf.folder} are sound")
    if refused:
        raise typer.Exit(FAILED)


def find(shelf: FolderStore, start: str) -> str:
    """Return the one id that starts like this.

    Raises:
        KernelError: None does, or several do.
    """
    ids = shelf.ids()
    found = [one for one in ids if one.startswith(start)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(one[:SHORT] for one in (found or ids)[:8]) or "none"
    raise KernelError(
        f"{len(found)} kernels in {shelf.folder} start with {start[:80]!r}; "
        f"{'they are' if found else 'known are'}: {known}"
    )


def opened(shelf: FolderStore, kernel: str, key: bytes) -> Kernel:
    """Read one kernel, checked.

    Raises:
        KernelError: It is missing or refused.
    """
    container = shelf.get(kernel)
    if container is None:
        raise KernelError(f"no kernel {kernel} in {shelf.folder}")
    return open_sealed(container, key, kernel)


def examine(shelf: FolderStore, kernel: str, key: bytes) -> Row:
    """Describe one kernel; of a refused one nothing is known but why."""
    try:
        return describe(opened(shelf, kernel, key))
    except KernelError as error:
        return {"id": kernel, "refused": str(error)}


def describe(kernel: Kernel) -> Row:
    """Say what a sound kernel is, as JSON values."""
    table = tensor_table(kernel.weights, "weights")
    return {
        "id": kernel.id,
        "refused": None,
        "blueprint": text.loads(kernel.graph).get("name"),
        "layout": kernel.signature.layout,
        "port": kernel.signature.port,
        "inputs": kernel.signature.inputs,
        "outputs": kernel.signature.outputs,
        "hidden": kernel.hidden,
        "seed": kernel.seed,
        "published": is_published(kernel),
        "pipeline": kernel.pipeline,
        "variants": {name: len(content) for name, content in kernel.variants.items()},
        "toolchain": kernel.toolchain,
        "tensors": len(table),
        "weight_bytes": len(kernel.weights),
    }


def print_table(rows: list[Row]) -> None:
    """Draw the list, refused kernels below it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("kernel", "blueprint", "fits", "hidden", "weights", "pipeline", box=None, pad_edge=False)
    for row in (row for row in rows if row["refused"] is None):
        cells = [
            row["id"][:SHORT],
            str(row["blueprint"] or "–"),
            f"{row['layout']} {row['inputs']} → {row['outputs']}, {row['port']}",
            str(row["hidden"]),
            f"{row['weight_bytes']:,} bytes, {'published' if row['published'] else 'initial'}",
            row["pipeline"],
        ]
        # Text, not markup: names come from the graph.
        table.add_row(*(Text(printable(cell, keep="")) for cell in cells))
    if table.row_count:
        Console().print(table)
    for row in (row for row in rows if row["refused"] is not None):
        say(f"refused {row['id'][:SHORT]}: {row['refused']}")
