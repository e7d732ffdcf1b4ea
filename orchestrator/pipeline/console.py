"""What a run says: a line when a stage starts or ends, and a table at the end."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from orchestrator.data.sources.account import HEADER, row
from orchestrator.errors import shortened
from orchestrator.pipeline.dag import order
from orchestrator.pipeline.keys.cache_key import short
from orchestrator.progress import BARS, Progress, time_left
from orchestrator.redact import HIDDEN, KeyBlocks, redacted
from orchestrator.table import Rows
from orchestrator.units import duration

if TYPE_CHECKING:
    from orchestrator.data.sources.account import Account
    from orchestrator.errors import UserError
    from orchestrator.pipeline.check.pipeline_check import Checked
    from orchestrator.pipeline.load import LoadedPipeline
    from orchestrator.pipeline.plan.stage_plan import StagePlan
    from orchestrator.pipeline.run.attempt import Outcome
    from orchestrator.pipeline.store.ledger import PipelineState

STYLES = {
    "done": ("✓", "green"),
    "cached": ("✓", "green"),
    "run": ("▶", "cyan"),
    "running": ("▶", "cyan"),
    "stopped": ("■", "yellow"),
    "interrupted": ("■", "yellow"),
    "failed": ("✗", "red"),
    "blocked": ("·", "bright_black"),
    "left out": ("·", "bright_black"),
    "pending": ("·", "bright_black"),
}

_BAR_WIDTH = 24
_TROUBLES = {"corrupt", "restarts", "preemptions", "steps_lost"}


class Reporter:
    """Tells the user how a run goes.

    Args:
        console: where to.
        again: the command that goes on after a stop.
        since: when the command began, by `time.monotonic`; default: now.
    """

    def __init__(self, console: Console, again: str = "the same command", since: float | None = None) -> None:
        self._console = console
        self._again = again
        self._width = 0
        self._started = time.monotonic() if since is None else since
        self._results: dict[str, tuple[str, float, Mapping[str, float]]] = {}
        # The stage that runs, and since when.
        self._current: tuple[str, float] | None = None

    def nothing_to_do(self, plans: Sequence[StagePlan], compared: Sequence[str]) -> None:
        """Everything is there already, in the store and outside, where what the `compared` stages did is."""
        also = "".join(f" The registry already has what {name} publishes." for name in compared)
        self._console.print(
            Text("✓", "green").append(f" Nothing to do: {_up_to_date(plans)}{also}", "default"),
            soft_wrap=True,
        )
        if note := _other_code(plans):
            self._console.print(Text(f"  {note}", style="bright_black"), soft_wrap=True)

    def note(self, text: str) -> None:
        """Something about the run as a whole that the user should know."""
        self._console.print(Text(f"! {text}", style="yellow"), soft_wrap=True)

    def warning(self, warning: UserError) -> None:
        """Something that may be wrong, with its place and the nearest right thing."""
        _print_warning(self._console, warning)

    def lost(self, why: str, hint: str | None = None) -> None:
        """Another driver may have the pipeline by now, so this one ends."""
        line = Text("✗", "red").append(f" Ended: {why}.", "default")
        self._console.print(line.append(" Nothing more was written.", "default"), soft_wrap=True)
        if hint is not None:
            self._console.print(Text(f"  hint {hint}", "bright_black"), soft_wrap=True)

    def begin(self, plans: Sequence[StagePlan]) -> None:
        """The run starts."""
        self._width = max(len(item.name) for item in plans)

    def starting_cluster(self, address: str) -> None:
        """Ray is about to be started or joined."""
        what = "starting Ray" if address == "local" else f"joining Ray at {address}"
        self._console.print(Text(f"  {what} …", style="bright_black"))

    def cached(self, item: StagePlan) -> None:
        """A stage is skipped."""
        self._results[item.name] = ("cached", 0.0, item.artifact.manifest.summary if item.artifact else {})
        self._line("cached", item.name, "cached", item.reasons[0], style="bright_black")

    def left_out(self, item: StagePlan) -> None:
        """A stage was not chosen."""
        self._results[item.name] = ("left out", 0.0, {})

    def started(self, item: StagePlan, attempt: int) -> None:
        """A stage starts."""
        self._current = item.name, time.monotonic()
        number = f"attempt {attempt}, " if attempt > 1 else ""
        self._line("run", item.name, "started", number + item.reasons[0])
        for reason in item.reasons[1:]:
            self._console.print(Text(" " * (self._width + 13) + reason, style="bright_black"), soft_wrap=True)

    def done(self, item: StagePlan, outcome: Outcome) -> None:
        """A stage is done."""
        self._current = None
        self._results[item.name] = ("done", outcome.seconds, outcome.summary)
        self._line("done", item.name, f"done in {duration(outcome.seconds)}", figures(outcome.summary))

    def stopped(self, item: StagePlan, outcome: Outcome) -> None:
        """A stage stopped because it was asked to."""
        self._current = None
        self._results[item.name] = ("stopped", outcome.seconds, {})
        self._line("stopped", item.name, f"stopped after {duration(outcome.seconds)}", outcome.message or "")

    def failed(self, item: StagePlan, outcome: Outcome, log: Path) -> None:
        """A stage failed; the traceback is in its log."""
        self._current = None
        self._results[item.name] = ("failed", outcome.seconds, {})
        self._line("failed", item.name, f"failed after {duration(outcome.seconds)}", outcome.message or "")
        indent = " " * (self._width + 4)
        where, hint = getattr(outcome.error, "where", None), getattr(outcome.error, "hint", None)
        for label, text in (("at  ", where), ("hint", hint), ("log ", str(log))):
            if text:
                self._console.print(Text(f"{indent}{label} {redacted(text)}"), soft_wrap=True)

    def blocked(self, item: StagePlan, lacking: Sequence[str]) -> None:
        """A stage cannot run because one that it needs did not succeed."""
        self._results[item.name] = ("blocked", 0.0, {})
        self._line("blocked", item.name, "not run", f"lacks {', '.join(lacking)}", style="bright_black")

    def stopping(self) -> None:
        """The first Ctrl-C came."""
        text = "Stopping once the stage has saved its state. Press Ctrl-C again to abort at once."
        self._console.print(Text(text, style="yellow"))

    def finished(self, plans: Sequence[StagePlan], state: PipelineState, exit_code: int) -> None:
        """The run is over: the table, and how to go on if it is not complete."""
        self._table(plans)
        took = duration(time.monotonic() - self._started)
        line = Text()
        if exit_code == 0:
            line.append("✓", "green").append(f" Done in {took}.")
        elif exit_code == 130:
            line.append("■", "yellow").append(f" Stopped after {took}. Finished work is kept. Continue with:")
            line.append(f"\n  {self._again}", "bold")
        else:
            line.append("✗", "red").append(
                f" Failed after {took}. Finished work is kept. Once the cause is fixed, continue with:"
            )
            line.append(f"\n  {self._again}", "bold")
        self._console.print(line, soft_wrap=True)

    def aborted(self, plans: Sequence[StagePlan]) -> None:
        """The second Ctrl-C came, and the process is about to end."""
        if self._current is not None:
            name, since = self._current
            self._results[name] = ("interrupted", time.monotonic() - since, {})
        self._table(plans)
        took = duration(time.monotonic() - self._started)
        line = Text("■", "yellow").append(
            f" Aborted after {took}. Finished work and complete checkpoints are kept. Continue with:",
            "default",
        )
        self._console.print(line.append(f"\n  {self._again}", "bold"), soft_wrap=True)
        # The line that changes had hidden it.
        self._console.show_cursor()

    def accounts(self, accounts: Sequence[Account]) -> None:
        """What the datasets hold: files that were taken, and left out by reason."""
        table = Rows(HEADER, expendable=())
        for one in accounts:
            table.add(*row(one))
        table.print(self._console)

    def next_step(self, what: str, how: str | Path) -> None:
        """Where the user goes on from here: a page to look at, or a command."""
        here = Path.cwd()
        if isinstance(how, Path) and how.is_relative_to(here):
            how = how.relative_to(here)
        self._console.print(Text(f"  {what}: {how}", style="default"), soft_wrap=True)

    def _table(self, plans: Sequence[StagePlan]) -> None:
        table = Rows(("stage", "result", "time", "key", "figures"), expendable=("key",))
        for item in plans:
            result, seconds, summary = self._results.get(item.name, ("pending", 0.0, {}))
            spent = duration(seconds) if seconds else ""
            table.add(item.name, mark(result), spent, short(item.stage.key), figures(summary))
        self._console.print()
        table.print(self._console)

    @contextlib.contextmanager
    def working(self, item: StagePlan) -> Iterator[None]:
        """While a stage runs: clock, bars and newest log line on a terminal, all lines elsewhere; warnings always."""
        ticker = _Ticker(item.name)
        handler = _ToConsole(self._console, ticker)
        logger = logging.getLogger("orchestrator")
        logger.addHandler(handler)
        live: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self._console.is_terminal:
            BARS.setLevel(logging.DEBUG)
            live = Live(ticker, console=self._console, refresh_per_second=4, transient=True)
        try:
            with live:
                yield
        finally:
            BARS.setLevel(logging.NOTSET)
            logger.removeHandler(handler)

    @contextlib.contextmanager
    def comparing(self) -> Iterator[None]:
        """While a stage is compared with what is outside the store: warnings are shown."""
        handler = _ToConsole(self._console, None)
        handler.setLevel(logging.WARNING)
        logger = logging.getLogger("orchestrator")
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)

    def _line(self, state: str, name: str, what: str, detail: str, style: str = "") -> None:
        symbol, colour = STYLES[state]
        line = Text()
        line.append(symbol, style=colour)
        line.append(f" {name:<{self._width}}", style=style or "bold")
        line.append(f"  {what}", style=style)
        if detail:
            line.append(f"  {detail}", style="bright_black" if state in ("run", "cached") else style)
        self._console.print(line, soft_wrap=True)


class _Ticker:
    """What changes while a stage runs: spinner, clock and newest message, and below a bar for each thing counted."""

    def __init__(self, name: str) -> None:
        self._spinner = Spinner("dots")
        self._name = name
        self._started = time.monotonic()
        self._bars: dict[str, Progress] = {}
        self.message = ""

    def show(self, progress: Progress) -> None:
        """The bar of what `progress` is about, new or moved on."""
        # By another thread than the one that draws: a new mapping, not a changed one.
        self._bars = {**self._bars, progress.name: progress}

    def __rich__(self) -> RenderableType:
        text = f" {self._name}  {duration(time.monotonic() - self._started)}  {self.message}"
        self._spinner.text = Text(text, no_wrap=True, overflow="ellipsis", style="bright_black")
        if not self._bars:
            return self._spinner
        bars = Table.grid(padding=(0, 1, 0, 0))
        rows = [
            (f"  {name.removeprefix(f'{self._name}/')}", bar, f"{bar.done:,}/{bar.total:,}")
            for name, bar in self._bars.items()
        ]
        # On a narrow terminal the bar and what stands behind it give way first.
        bars.add_column(no_wrap=True, min_width=max(cell_len(name) for name, _, _ in rows))
        bars.add_column(width=_BAR_WIDTH)
        bars.add_column(justify="right", no_wrap=True, min_width=max(len(count) for _, _, count in rows))
        bars.add_column(no_wrap=True, overflow="ellipsis")
        for name, bar, count in rows:
            left = time_left(bar.left_s) if bar.left_s else ""
            bars.add_row(
                Text(name),
                ProgressBar(total=bar.total, completed=bar.done),
                Text(count),
                Text(" · ".join(filter(None, (left, bar.detail))), style="bright_black"),
            )
        return Group(self._spinner, bars)


class _ToConsole(logging.Handler):
    def __init__(self, console: Console, ticker: _Ticker | None) -> None:
        super().__init__(logging.DEBUG)
        self._console = console
        self._ticker = ticker
        self._keys = KeyBlocks()

    def emit(self, record: logging.LogRecord) -> None:
        """The newest message goes to the ticker, or a line of its own where there is none; warnings stay.

        So does what is logged with `extra={"kept": True}`: a result that the user is to see.
        """
        progress = getattr(record, "progress", None)
        if progress is not None and self._ticker is not None:
            self._ticker.show(progress)
        if record.levelno < logging.INFO or (getattr(record, "routine", False) and self._console.is_terminal):
            return
        message = record.getMessage()
        hides = self._keys.hides(message)
        first = HIDDEN if hides else shortened(redacted(next(iter(message.splitlines()), "")))
        if self._ticker is not None:
            self._ticker.message = first
        stays = not self._console.is_terminal or getattr(record, "kept", False)
        if record.levelno == logging.INFO and stays:
            self._console.print(Text(f"  · {first}", style="bright_black"), soft_wrap=True)
        if record.levelno == logging.WARNING:
            self._console.print(Text(f"  ! {first}", style="yellow"), soft_wrap=True)


def print_plan(console: Console, loaded: LoadedPipeline, plans: Sequence[StagePlan]) -> None:
    """The DAG in running order: what each stage needs, whether it runs, and every reason."""
    table = Rows(("stage", "kind", "needs", "action", "why"), expendable=("needs", "kind"))
    for item in plans:
        needs = ", ".join(item.stage.needs) or "—"
        table.add(item.name, loaded.kind_of(item.name), needs, mark(item.action), "\n".join(item.reasons))
    console.print(Text(f"Pipeline {loaded.name}", style="bold"))
    table.print(console)
    running = [item.name for item in plans if item.action == "run"]
    to_run = f"{len(running)} of {len(plans)} stages to run: {', '.join(running)}"
    compared = [item.name for item in plans if item.action == "cached" and item.stage.effects]
    nothing = f"{'Nothing to train' if compared else 'Nothing to do'}: {_up_to_date(plans)}"
    console.print(Text(to_run if running else nothing), soft_wrap=True)
    if compared:
        names = ", ".join(compared)
        text = f"A run compares what {names} publishes with the registry, and moves an alias that differs."
        console.print(Text(text), soft_wrap=True)
    if note := _other_code(plans):
        console.print(Text(note, style="bright_black"), soft_wrap=True)


def print_stages(console: Console, loaded: LoadedPipeline) -> None:
    """The DAG alone, where keys cannot be known because data is not there."""
    table = Rows(("stage", "kind", "needs"), expendable=("kind",))
    for name in order(loaded):
        stage = loaded.spec.stages[name]
        table.add(name, loaded.kind_of(name), ", ".join(stage.needs) or "—")
    console.print(Text(f"Pipeline {loaded.name}", style="bold"))
    table.print(console)
    for missing in loaded.missing:
        _print_warning(console, missing)
    if loaded.missing:
        note = "Which stages would run is known once nothing is missing."
        console.print(Text(note, style="bright_black"), soft_wrap=True)


def print_findings(console: Console, found: Checked, *, incomplete_only: bool = False) -> None:
    """What was found before the first step and does not stand in the way: captions, and warnings.

    Args:
        console: where to.
        found: all of it.
        incomplete_only: whether sources all of whose photos have captions are passed over, and what stages decide.
    """
    for text, complete in found.facts:
        if not (complete and incomplete_only):
            console.print(Text(f"  {text}", style="bright_black"), soft_wrap=True)
    for choice in () if incomplete_only else found.choices:
        console.print(Text(f"  {choice}", style="bright_black"), soft_wrap=True)
    for warning in found.warnings:
        _print_warning(console, warning)


def _print_warning(console: Console, warning: UserError) -> None:
    for number, line in enumerate(str(warning).splitlines()):
        text = f"! {line}" if number == 0 else line
        console.print(Text(text, style="yellow" if number == 0 else "bright_black"), soft_wrap=True)


def _up_to_date(plans: Sequence[StagePlan]) -> str:
    chosen = [item for item in plans if item.action != "left out"]
    number = f"all {len(chosen)} stages are" if len(chosen) > 1 else "the stage is"
    if len(chosen) < len(plans):
        number = f"{', '.join(item.name for item in chosen)} {'are' if len(chosen) > 1 else 'is'}"
    return f"{number} up to date."


def _other_code(plans: Sequence[StagePlan]) -> str:
    names = [item.name for item in plans if item.action == "cached" and item.other_code]
    if not names:
        return ""
    verb, them = ("were", "them") if len(names) > 1 else ("was", "it")
    return (
        f"{', '.join(names)} {verb} made by other code and {'are' if len(names) > 1 else 'is'} kept: "
        f"--rerun-on code makes {them} again."
    )


def mark(state: str) -> Text:
    """A state with its symbol and colour."""
    symbol, colour = STYLES[state]
    return Text(f"{symbol} {state}", style=colour)


def figures(summary: Mapping[str, float], limit: int = 6) -> str:
    """`loss 3.21 · knn 0.713`; without what has a column of its own, and without troubles that there were none of."""
    told = [
        f"{name} {figure(value)}"
        for name, value in summary.items()
        if name != "seconds_total" and (value or name not in _TROUBLES)
    ]
    return " · ".join(told[:limit]) + (" · …" if len(told) > limit else "")


def figure(value: float) -> str:
    """A number with four significant digits, whole if it is whole."""
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.4g}"
