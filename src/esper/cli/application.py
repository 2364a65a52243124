"""The application the subcommands are registered on: errors become one line and an exit code."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from esper.errors import EsperError, MissingExtraError
from esper.printable import printable

OK, FAILED, BAD_INPUT, MISSING_EXTRA = 0, 1, 2, 3
EXIT_CODES = (
    "Exit codes: 0 all is well; 1 what was asked for failed (a bench missed its promise, training broke "
    "down); 2 bad input; 3 an extra must be installed; 130 interrupted."
)


class Commands(TyperGroup):
    """Runs a subcommand; what Esper raises ends as one line on standard error, without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run, and turn an error of Esper's tree into its exit code."""
        try:
            return super().invoke(ctx)
        except EsperError as error:
            print(f"esper: {error}", file=sys.stderr)  # an EsperError is printable
            raise typer.Exit(exit_code(error)) from None
        except Exception as error:  # only to make the words of a wrong argument printable
            raise shown(error) from None

    def make_context(self, *given: Any, **more: Any) -> Any:
        """Read the arguments before the subcommand's name."""
        try:
            return super().make_context(*given, **more)
        except Exception as error:  # likewise
            raise shown(error) from None


def shown(error: Exception) -> Exception:
    """Return an error; a usage error of typer's quotes what was typed, and is drawn in its own box."""
    message = getattr(error, "message", None)
    if hasattr(error, "format_message") and isinstance(message, str):
        vars(error)["message"] = printable(message)
    return error


def exit_code(error: EsperError) -> int:
    """Tell the caller's mistakes (values, names) from what failed on the way (surgery, transitions)."""
    if isinstance(error, MissingExtraError):
        return MISSING_EXTRA
    return BAD_INPUT if isinstance(error, ValueError | LookupError) else FAILED


app = typer.Typer(
    name="esper",
    cls=Commands,
    help="Grow a PyTorch model while it trains.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def show_version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        import esper

        print(f"esper {esper.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Take what stands before a subcommand."""


def main() -> None:
    """Run the ``esper`` command on the process's arguments."""
    app(prog_name="esper")
