"""The ``esper`` command: one file per subcommand, and nothing heavy imported before one of them runs."""

from __future__ import annotations

from esper.cli import bench, blueprints, chaos, checkpoints, demo, doctor, kernels, report, train, why
from esper.cli.application import app, main

__all__ = ["app", "main"]

app.command()(demo.demo)
app.command()(train.train)
app.command()(report.report)
app.command()(why.why)
app.command(context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]})(bench.bench)
app.command()(chaos.chaos)
app.command()(doctor.doctor)
app.add_typer(blueprints.blueprints, name="blueprints")
app.add_typer(kernels.kernels, name="kernels")
app.add_typer(checkpoints.checkpoints, name="checkpoints")
