"""What the ledger, the spool and the logs say about a pipeline."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from orchestrator.errors import UserError, nearest
from orchestrator.pipeline.console import figures, mark
from orchestrator.pipeline.keys.cache_key import diff, short
from orchestrator.pipeline.lease.process_identity import is_suspended
from orchestrator.pipeline.load import LoadedPipeline
from orchestrator.pipeline.maintenance.gc import left_behind, summary
from orchestrator.pipeline.plan.stage_plan import as_recorded
from orchestrator.pipeline.store.ledger import PipelineState, StageState
from orchestrator.pipeline.store.workspace import Workspace
from orchestrator.pipeline.tracking.tracking_run import waiting
from orchestrator.shell_command import command
from orchestrator.table import Rows
from orchestrator.tracking.backlog import counted
from orchestrator.tracking.spool import Spool
from orchestrator.units import duration

# Of the tags that elastic/run_state.py sets.
_TAGS = "ray_train."
_RUN_TAGS = {"name", "status", "workers", "num_attempts", "attempts"}
# Ray Train's states of what has ended.
_ENDED = {"FINISHED", "ERRORED", "ABORTED"}
# What is named of what was left behind.
_ORPHANS = 5
# What is named of the settings of a stage that changed.
_CHANGES = 3
_CAUSES = ("startup", "lost", "checkpoint", "restart", "waiting")
# Channels of metrics that are not the figures of training.
_OTHER_CHANNELS = ("goodput", "checkpoint", "sharing", "system", "val", "io")
# Metrics of a step that compare runs and tell nothing of how this one does.
_NOT_FIGURES = ("sample_order",)


def print_status(console: Console, loaded: LoadedPipeline) -> None:
    """A table of stages: state, attempts, time, key, newest figures."""
    workspace = Workspace(loaded.spec.store)
    # The driver first: one that ends meanwhile must not leave its last stage looking interrupted.
    driver = workspace.driver(loaded.name)
    driven = driver is not None and driver.alive
    state = workspace.state(loaded.name)
    if not state.started:
        console.print(Text(f"Pipeline {loaded.name} was never run."), soft_wrap=True)
        return
    spool_folder = workspace.spool(loaded.name)
    spool = Spool(spool_folder) if spool_folder.is_dir() else None
    columns = ("stage", "kind", "state", "attempts", "time", "goodput", "key", "newest figures")
    table = Rows(columns, expendable=("kind", "key", "goodput", "attempts"))
    for name in loaded.spec.stages:
        known = state.stages.get(name, StageState(name))
        shown = "interrupted" if known.state == "running" and not driven else known.state
        attempts = "reused" if known.reused and not known.attempts else str(known.attempts or "")
        spent = _seconds(known, running=shown == "running")
        detail = known.error or figures(known.summary) or _newest(spool, known.run_id)
        key = short(known.key) if known.key else ""
        time_text = duration(spent) if spent else ""
        good = _goodput(spool, known)
        table.add(name, loaded.kind_of(name), mark(shown), attempts, time_text, good, key, detail)
    console.print(Text(f"Pipeline {loaded.name}", style="bold"))
    table.print(console)
    known_stages = [state.stages[name] for name in loaded.spec.stages if name in state.stages]
    _print_runs(console, spool, known_stages, driven=driven)
    _print_other_settings(console, loaded, state)
    _print_orphans(console, loaded, workspace)
    if (waits := waiting(loaded, workspace)) is not None:
        # Those of a run that goes on are about to be sent.
        text = f"{counted(waits.backlog.records)} waiting to be sent to MLflow."
        calm = driven and waits.outage is None
        console.print(Text(text if calm else f"{waits}.", style="" if calm else "yellow"), soft_wrap=True)
    if driver is not None:
        what = "It is being run by" if driven else "It was interrupted: there is no heartbeat from"
        console.print(Text(f"{what} {driver.who}."), soft_wrap=True)
        if driven and is_suspended(driver.who):
            text = f"! That process is suspended: `kill -CONT {driver.who.pid}` resumes it."
            console.print(Text(text, style="yellow"), soft_wrap=True)


def _print_other_settings(console: Console, loaded: LoadedPipeline, state: PipelineState) -> None:
    """The stages whose row is of a run with other settings than the file and the overrides have now."""
    changed = {}
    for stage in as_recorded(loaded, state):
        known = state.stages.get(stage.name)
        if known is not None and known.parts is not None and known.key != stage.key:
            changed[stage.name] = diff(known.parts, stage.parts)
    if not changed:
        return
    text = (
        f"! Run with other settings than these: {', '.join(changed)}. `plan` says what `run` does with these."
    )
    console.print(Text(text, style="yellow"), soft_wrap=True)
    for name, lines in changed.items():
        # Where an earlier stage's settings changed, the inputs of the later ones did, too: that tells nothing more.
        own = [line for line in lines if not line.startswith("input ")]
        more = f"; and {len(own) - _CHANGES} more" if len(own) > _CHANGES else ""
        if own:
            console.print(
                Text(f"  {name}: {'; '.join(own[:_CHANGES])}{more}", style="bright_black"), soft_wrap=True
            )


def _print_orphans(console: Console, loaded: LoadedPipeline, workspace: Workspace) -> None:
    """What is needed no more, or why that is not known."""
    try:
        found = left_behind(loaded, workspace)
    except UserError as error:
        console.print(Text(f"! {error.what} ({error.where})", style="yellow"), soft_wrap=True)
        return
    if not found:
        return
    collect = command("gc", str(loaded.path))
    text = f"Left behind: {summary(found)}. `{collect}` lists and deletes them."
    console.print(Text(text, style="yellow"), soft_wrap=True)
    for orphan in found[:_ORPHANS]:
        console.print(Text(f"  {orphan.name}", style="bright_black"), soft_wrap=True)
    if len(found) > _ORPHANS:
        console.print(Text(f"  and {len(found) - _ORPHANS} more", style="bright_black"))


def _print_runs(console: Console, spool: Spool | None, stages: Sequence[StageState], *, driven: bool) -> None:
    """The Ray Train runs of the stages, as Ray's own state API lists them; without a driver, none goes on."""

    def shown(status: str) -> str:
        return status if driven or status in _ENDED else "BROKEN OFF"

    runs = [tags for stage in stages for tags in _ray_train(spool, stage)]
    if not runs:
        return
    failures = "failed ranks, newest first"
    columns = ("Ray Train run", "state", "workers", "attempts", "newest attempt", failures)
    table = Rows(columns, expendable=("workers", "attempts", "newest attempt"))
    for tags in runs:
        attempts = _attempts(tags["attempts"])
        newest = f"{shown(attempts[-1]['status'])}, {_workers(attempts[-1]['workers'])}" if attempts else ""
        failed = [
            f"{', '.join(map(str, one['failed_ranks']))}: {one.get('detail', '')}"
            for one in reversed(attempts)
            if one["failed_ranks"]
        ]
        table.add(
            tags["name"],
            shown(tags["status"]),
            tags["workers"],
            str(tags["num_attempts"]),
            newest,
            "; ".join(failed[:2]),
        )
    table.print(console)


def _workers(count: object) -> str:
    return f"{count} worker{'' if str(count) == '1' else 's'}"


def _ray_train(spool: Spool | None, stage: StageState) -> list[dict[str, str]]:
    """What Ray Train last reported of a stage's runs; of each student, where it has several."""
    if spool is None or stage.run_id is None:
        return []
    found = []
    for run_id in (stage.run_id, *spool.children(stage.run_id)):
        tags: dict[str, str] = {}
        for record, _ in spool.read(run_id):
            if record["op"] == "tags":
                tags |= record["tags"]
        own = {name.removeprefix(_TAGS): value for name, value in tags.items() if name.startswith(_TAGS)}
        if own.keys() >= _RUN_TAGS:
            found.append(own)
    return found


def _attempts(text: str) -> list[dict[str, Any]]:
    """The attempts of a run, oldest first; without those that another version describes otherwise."""
    try:
        attempts = json.loads(text)
    except (ValueError, RecursionError):
        return []
    if not isinstance(attempts, list):
        return []
    return [
        one
        for one in attempts
        if isinstance(one, dict)
        and {"status", "workers"} <= one.keys()
        and isinstance(one.get("failed_ranks"), list)
    ]


def read_log(loaded: LoadedPipeline, stage: str, last: int = 0) -> Iterator[str]:
    """Lines of a stage's log; with `last` > 0 only so many from its end.

    Raises:
        UserError: no such stage, or it has no log yet.
    """
    stages = loaded.spec.stages
    if stage not in stages:
        close = nearest(stage, stages)
        raise UserError(
            f"there is no stage {stage!r}",
            where=str(loaded.path),
            hint=f"did you mean {close!r}?" if close else f"there are: {', '.join(stages)}",
        )
    path = Workspace(loaded.spec.store).bring_log(loaded.name, stage)
    if not path.is_file():
        raise UserError(f"stage {stage!r} has no log: it never ran", where=str(path))
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    yield from lines[-last:] if last else lines


def _seconds(stage: StageState, *, running: bool) -> float:
    now = time.time() - stage.started if running and stage.started else 0.0
    return stage.seconds + now


def _newest(spool: Spool | None, run_id: str | None) -> str:
    """The newest metrics of a run, from the spool: nothing has to reach MLflow first."""
    history = spool.history(run_id) if spool is not None and run_id is not None else []
    history = [record for record in history if record["channel"] not in _OTHER_CHANNELS]
    if not history:
        return ""
    newest = max(history, key=lambda record: record["time_ms"])
    metrics = {name: value for name, value in newest["metrics"].items() if name not in _NOT_FIGURES}
    return f"step {newest['step']}: {figures(metrics)}"


def _goodput(spool: Spool | None, stage: StageState) -> str:
    """The share of time that trained, and the largest loss; of the worst student, where there are several."""
    if spool is None or stage.run_id is None:
        return f"{stage.summary['goodput']:.0%}" if "goodput" in stage.summary else ""
    newest, needed = [], {"goodput", *(f"seconds_{cause}" for cause in _CAUSES)}
    for run_id in (stage.run_id, *spool.children(stage.run_id)):
        history = [
            record for record in spool.history(run_id, "goodput") if needed <= record["metrics"].keys()
        ]
        if history:
            newest.append(max(history, key=lambda record: int(record["step"]))["metrics"])
    if not newest:
        return ""
    worst = min(newest, key=lambda metrics: float(metrics["goodput"]))
    causes = {cause: worst[f"seconds_{cause}"] for cause in _CAUSES}
    cause = max(_CAUSES, key=causes.__getitem__)
    return f"{worst['goodput']:.0%}, {cause} {duration(causes[cause])}"
