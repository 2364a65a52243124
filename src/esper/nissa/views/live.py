"""The terminal view of a run: a screen that follows it, or plain lines where there is no terminal."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from esper.contracts import Event
from esper.log import shown_elsewhere
from esper.nissa.run.facts import LookFacts, ReopenedFacts, facts_of
from esper.nissa.run.history import RunHistory, fold
from esper.nissa.run.records import DecisionHistory, SeedHistory
from esper.nissa.run.survival import notes, of_ranks, reopened, rewrapped, took_back, went_on
from esper.nissa.views.palette import STAGE_COLOURS
from esper.nissa.views.why import evidence, headline
from esper.nissa.wording import UNKNOWN, count, duration, short
from esper.printable import printable

REFRESHES = (
    4  # a second, by a thread of its own: an event costs the training thread one fold, never a drawing
)
ROWS = 12  # sites shown; a large model has hundreds, most of them quiet
DECISIONS = 4  # shown, newest first
NOTES = 3  # of what the run survived, newest last
NOTED = {"alarm": "red", "rolled back": "red", "taken back": "yellow", "resumed": "cyan"}


class LiveView:
    """Shows events as they come; call it with each one, inside ``with``.

    On a terminal it redraws one screen, at most four times a second; elsewhere it prints one line per event
    worth a line.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        plain: bool | None = None,
        transient: bool = False,
        past: Iterable[Event] = (),
    ) -> None:
        """Choose where to show.

        Args:
            console: Rich console written to; standard error by default, so that standard output stays the
                program's.
            plain: True for lines instead of a screen; by default wherever the console is not a terminal.
            transient: True to take the screen away at the end.
            past: Events the journal holds already, where a run goes on: shown with the rest, not said again.
        """
        self.history = fold(past)
        self._console = console or Console(stderr=True)
        self._plain = not self._console.is_terminal if plain is None else plain
        self._lock = threading.Lock()
        self._log = ExitStack()
        self._tenths = {"progress": 0, "epoch": 0, "checkpoint": 0}
        self._live = Live(
            get_renderable=self._screen,
            console=self._console,
            refresh_per_second=REFRESHES,
            transient=transient,
            redirect_stdout=sys.stdout.isatty(),
        )

    def __call__(self, event: Event) -> None:
        """Take one event in."""
        with self._lock:
            self.history.add(event)
        if self._plain:
            for line in self._lines(event):
                told = printable(f"[{event.step:>6}] {line}", keep="")
                self._console.print(told, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> LiveView:
        self._log.enter_context(shown_elsewhere())
        if not self._plain:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.close()
        if not self._plain:
            self._live.stop()

    def _screen(self) -> RenderableType:
        with self._lock:  # only the parts are built here; rich lays them out after the lock is free
            if not self.history.started:
                return Text("waiting for the first event", style="dim")
            parts = [
                _header(self.history),
                _sites(self.history),
                _decisions(self.history),
                *_trouble(self.history),
            ]
        return Group(*parts)

    def _lines(self, event: Event) -> Iterator[str]:
        """Say a notable event in one line; most events are not."""
        data = event.data
        match event.kind:
            case "run_started":
                sites = len(data["sites"])
                yield f"{data['model']}: {data['parameters']:,} parameters, can grow at {sites} sites"
            case "progress" if self._is_due("progress"):
                spent = duration(self.history.seconds)
                yield f"loss {short(data['loss'])}, {data['parameters']:,} parameters, {spent}"
            case "epoch" if self._is_due("epoch"):
                yield f"epoch {data['epoch']}: {short(data['metrics'])}"
            case "decision":
                what = headline(self.history.decisions[data["decision"]])
                yield f"decision {data['decision']}: {what} ({data['reason']})"
            case "gate":
                word = "passed" if data["passed"] else "refused"
                proof = evidence(facts_of(event, LookFacts))
                yield f"gate {word} at {data['site']}: gain {short(data['gain'])}, {proof} needed"
            case "widened":
                yield f"{data['site']} grew by {data['units']} units, {data['parameters']:,} parameters now"
            case "deepened":
                yield f"{data['site']} has {data['blocks']} blocks, {data['parameters']:,} parameters now"
            case "grafted":
                how = "was folded into its layer" if data["how"] == "merged" else "became a branch"
                yield f"{data['site']} {how}, {data['parameters']:,} parameters now"
            case "compiled":
                yield f"{data['site']} runs as {data['pipeline']} from now on"
            case "recompiled":
                yield f"the host is compiled again ({data['policy']}): {data['why']}"
            case "outcome":
                word = "kept" if data["kept"] else "not kept"
                yield f"{data['site']} {word}: {data['reason']}"
            case "vitals" if data["score"] is not None and data["score"] < 0.5:
                yield f"the kernel at {data['site']} is not well: health {short(data['score'])}"
            case "fault":
                yield f"fault {data['count']} at {data['site']}: {data['error']}"
            case "fallback":
                yield f"fallback: {data['what']}, {data['why']}"
            case "warning":
                yield f"warning: {data['message']}"
            case "checkpoint" if self._is_due("checkpoint"):
                yield f"checkpoint {data['name']}, {count(data['bytes'])}B"
            case "resumed":
                yield went_on(self.history.resumes[-1])
            case "alarm":
                yield f"alarm: {data['message']}"
            case "rolled_back":
                yield str(data["message"])
            case "reopened":
                yield reopened(facts_of(event, ReopenedFacts))
            case "taken_back":
                yield f"taken back: {took_back(event)}"
            case "ranks":
                yield of_ranks(event)
            case "rewrapped":
                yield f"wrapped again: {rewrapped(event)}"
            case "run_finished":
                yield f"finished: {data['parameters']:,} parameters, {duration(self.history.seconds)}"

    def _is_due(self, kind: str) -> bool:
        """Let one line of a frequent kind through per tenth of the run."""
        steps = self.history.started.get("steps")
        tenths = self.history.step // max(1, (steps or 10_000) // 10)
        due, self._tenths[kind] = tenths > self._tenths[kind], tenths
        return due


def _header(history: RunHistory) -> Table:
    steps = history.started.get("steps")
    grid = Table.grid(padding=(0, 2))
    grid.add_row(
        _text(history.started["model"], "bold"),
        Text(f"step {history.step:,}" + (f" of {steps:,}" if steps else "")),
        ProgressBar(total=steps or None, completed=history.step, width=30, pulse=not steps),
        Text(duration(history.seconds), style="dim"),
    )
    learning = [f"loss {short(history.loss.last)}"]
    if history.epochs:
        learning.append(f"{short(history.epochs[-1].metrics)} (epoch {history.epochs[-1].epoch})")
    before, now = history.started["parameters"], history.parameters.last
    size = [f"parameters {before:,}" + (f" → {now:,.0f}" if now not in (None, before) else "")]
    size.append(
        f"FLOPs {count(history.training_flops.last)} training, {count(history.growth_flops.last)} growing"
    )
    if history.checkpoints:
        size.append(f"checkpoint at step {history.checkpoints[-1].data['step']:,}")
    outer = Table.grid()
    outer.add_row(grid)
    outer.add_row(_text("   ".join(learning)))
    outer.add_row(_text("   ".join(size)))
    return outer


def _sites(history: RunHistory) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for column in ("site", "units", "seed", "stage", "α"):
        table.add_column(column)
    newest: dict[str, SeedHistory] = {seed.site: seed for seed in history.seeds.values()}
    ordered = sorted(
        history.widths.items(), key=lambda item: item[0] not in newest
    )  # stable: touched sites first
    for site, (before, now) in ordered[:ROWS]:
        seed = newest.get(site)
        units = f"{before} → {now}" if now != before else str(before)
        if seed is None:
            table.add_row(_text(site), units, UNKNOWN, Text("dormant", style="dim"), "")
        else:
            stage = _text(seed.stage.lower().replace("_", " "), STAGE_COLOURS.get(seed.stage, ""))
            exposed = seed.stage in ("GRAFTING", "STABILISING", "EVALUATING")
            table.add_row(
                _text(site), units, _text(seed.seed), stage, short(seed.alpha.last, 2) if exposed else ""
            )
    if len(ordered) > ROWS:
        table.add_row(f"and {len(ordered) - ROWS} more", "", "", "", "")
    return table


def _decisions(history: RunHistory) -> Table:
    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, overflow="ellipsis")
    for decision in list(history.decisions.values())[: -DECISIONS - 1 : -1]:
        colour = {"kept": "green", "refused": "red", "taken back": "red"}.get(decision.verdict, "yellow")
        table.add_row(
            Text(f"step {decision.step:,}", style="dim"),
            _text(headline(decision), "bold"),
            Text(decision.verdict, style=colour),
            _text(_reason(decision), "dim"),
        )
    return table


def _reason(decision: DecisionHistory) -> str:
    if decision.outcome is not None and decision.kept:
        gain = short(decision.outcome["gain"], 3)
        return f"held-out gain {gain}, {decision.outcome['parameters']:+,} parameters"
    return str((decision.outcome or decision.chosen).get("reason", ""))


def _trouble(history: RunHistory) -> Iterator[Text]:
    for note in notes(history)[-NOTES:]:
        yield Text.assemble(
            (f"{note.kind} at step {note.step:,}: ", NOTED.get(note.kind, "yellow")),
            _text(note.text, "dim"),
            no_wrap=True,
            overflow="ellipsis",
        )
    if history.warnings:
        warning = _text(f"warning: {history.warnings[-1].data['message']}", "yellow")
        warning.no_wrap, warning.overflow = True, "ellipsis"
        yield warning
    if history.faults:
        last = history.faults[-1].data
        many = "fault" if len(history.faults) == 1 else "faults"
        yield _text(f"{len(history.faults)} {many}, last at {last['site']}: {last['error']}", "red")


def _text(value: object, style: str = "") -> Text:
    """Return text of an event for the screen: no markup, and nothing that moves the terminal."""
    return Text(printable(str(value), keep=""), style=style)
