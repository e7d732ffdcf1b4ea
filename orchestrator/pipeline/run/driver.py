"""Running a pipeline: what is done is skipped, what was broken off goes on, and the ledger knows it all."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

from orchestrator import disk
from orchestrator.byte_counts import BYTES
from orchestrator.data.sources import account
from orchestrator.errors import Stopped, UserError
from orchestrator.pipeline import dag
from orchestrator.pipeline.console import Reporter
from orchestrator.pipeline.keys.code_digest import digest_of
from orchestrator.pipeline.lease.lease_manager import Lease, LeaseLostError
from orchestrator.pipeline.load import LoadedPipeline
from orchestrator.pipeline.plan.stage_plan import (
    EVERYTHING,
    Choice,
    ResolvedStage,
    StagePlan,
    begun_with,
    is_awaited,
    needs_attention,
    other_inputs,
    plan,
)
from orchestrator.pipeline.run.attempt import Attempt, Outcome, full_disk
from orchestrator.pipeline.run.interrupt import ABORTED, Interrupt
from orchestrator.pipeline.run.run_cluster import RunCluster, StartCluster, starting_cluster
from orchestrator.pipeline.store.ledger import StageState
from orchestrator.pipeline.store.workspace import Workspace
from orchestrator.pipeline.tracking import system_metrics, tracking_run
from orchestrator.pipeline.tracking.run_record import RunRecord, sum_up
from orchestrator.shell_command import command
from orchestrator.stages.base import uncompared_in
from orchestrator.storage.artifacts import Artifact, DamagedError, folder_name
from orchestrator.tracking.run import NullRun, Run, Status

DONE, FAILED, MISTAKE = 0, 1, 2
# What a stage makes to be looked at: a page, or else lists.
REPORTS = ("report.html", "report.json")
# Of published models the last lines name so many.
_PULLED = 3
_STATUS: dict[int, Status] = {DONE: "FINISHED", ABORTED: "KILLED"}
_NOT_FINISHED: dict[str, Status] = {"FAILED": "FAILED", "KILLED": "KILLED"}
_OUTCOME_STATUS: dict[str, Status] = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}

# The pipeline, its workspace and the id of the pipeline's run (new or to be resumed) → the pipeline's run.
OpenTracking = Callable[[LoadedPipeline, Workspace, str], AbstractContextManager[Run]]


def execute(
    loaded: LoadedPipeline,
    stages: list[ResolvedStage],
    reporter: Reporter,
    *,
    start_cluster: StartCluster | None = None,
    open_tracking: OpenTracking | None = None,
    choice: Choice = EVERYTHING,
) -> int:
    """Run what has to run, and return the exit code: 0 done, 1 a stage failed or the pipeline was taken over,
    2 a mistake, 130 stopped.

    Args:
        loaded: the pipeline.
        stages: its resolved stages.
        reporter: tells the user.
        start_cluster: makes Ray available; called when the first stage that needs it is about to run.
        open_tracking: opens the pipeline's tracking run.
        choice: which stages to look at, and which to make anew.

    Raises:
        UserError: another driver runs this pipeline, the store or cluster cannot be used, or the choice makes no sense.
    """
    workspace = Workspace(loaded.spec.store)
    try:
        with workspace.drive(loaded.name, reporter.note) as lease:
            workspace.tidy()
            start = start_cluster or starting_cluster(loaded, stages, reporter.note)
            return _Driver(loaded, stages, workspace, lease, reporter, start, open_tracking, choice).execute()
    except LeaseLostError as error:
        reporter.lost(str(error), error.hint)
        return FAILED
    except Exception as error:
        if isinstance(error, UserError) or not disk.is_full(error):
            raise
        raise full_disk(error, workspace) from error


class _Driver:
    def __init__(
        self,
        loaded: LoadedPipeline,
        stages: list[ResolvedStage],
        workspace: Workspace,
        lease: Lease,
        reporter: Reporter,
        start_cluster: StartCluster,
        open_tracking: OpenTracking | None,
        choice: Choice,
    ) -> None:
        self._loaded = loaded
        self._workspace = workspace
        self._lease = lease
        self._reporter = reporter
        self._ledger = workspace.ledger(loaded.name, lease)
        self._plans = plan(
            stages,
            self._ledger.state,
            workspace.find,
            reached=workspace.reached,
            begun_from=workspace.begun_from,
            choice=choice,
        )
        self._record = RunRecord(loaded, workspace)
        self._artifacts: dict[str, Artifact] = {}
        self._exit_code = DONE
        self._interrupt = Interrupt()
        self._open_tracking = open_tracking or partial(
            tracking_run.open_tracking, say=reporter.note, stop=self._interrupt.stop
        )
        lease.on_lost = self._interrupt.stop.set
        self._spool_backup = workspace.spool_backup(loaded.name)
        if self._spool_backup is not None:
            self._spool_backup.check = lease.check
        self._open_runs: list[Run] = []
        self._cluster = RunCluster(loaded, workspace, reporter, self._interrupt, start_cluster)
        self._drifts: dict[str, tuple[str, ...]] = {}
        self._counted: Mapping[str, int] = BYTES.metrics()

    def execute(self) -> int:
        if not needs_attention(self._plans, self._ledger.state) and not self._drifted():
            for item in self._plans:
                self._note_cached(item)
                if item.action == "cached" and item.stage.effects and (lacking := self._lacking(item)):
                    text = f"what {item.name} publishes was not compared with the registry: not done: "
                    self._reporter.note(text + ", ".join(lacking))
            tracking_run.send_leftovers(self._loaded, self._workspace, self._reporter.note)
            self._reporter.nothing_to_do(self._plans, list(self._drifts))
            self._print_results()
            return DONE
        state = self._ledger.state
        before = state.status
        run_id = state.run_id if state.run_id and state.status != "FINISHED" else uuid.uuid4().hex
        # The id is on record before the run exists: a crash in between leaves no run that nobody knows.
        self._ledger.append("opened", run_id=run_id, reasons=tuple(self._lease.notes))
        self._interrupt.on_abort = self._abort
        self._interrupt.on_stop = self._reporter.stopping
        tracking = self._open_tracking(self._loaded, self._workspace, run_id)
        with self._interrupt.installed(), tracking as root:
            self._open_runs.append(root)
            status: Status = "FAILED"
            try:
                self._record.pipeline(root, self._plans, self._ledger.state)
                self._settle(root)
                with self._cluster:
                    self._run_all(root)
                status = _STATUS.get(self._exit_code, "FAILED")
                if status == "FINISHED" and any(self._missing(item) for item in self._plans):
                    # Some of the pipeline is missing still: it has not finished because a part of it has.
                    status = _NOT_FINISHED.get(before or "", "KILLED")
                self._record.results(root, self._artifacts, self._plans, self._ledger.state)
            finally:
                # The runs of a pipeline that another driver took over are that one's to finish.
                self._lease.check()
                self._open_runs.remove(root)
                root.finish(status)
                self._ledger.append("closed", status=status)
        self._reporter.finished(self._plans, self._ledger.state, self._exit_code)
        self._print_results()
        return self._exit_code

    def _print_results(self) -> None:
        """What the datasets hold; where to go on from here: reports, models, runs; what MLflow has not taken yet."""
        for artifact in self._artifacts.values():
            if accounts := account.load(artifact.path):
                self._reporter.accounts(accounts)
        for name, artifact in self._artifacts.items():
            # One that another machine made is in the remote store only.
            made = (artifact.path / report for report in REPORTS if report in artifact.manifest.files)
            if path := next((path for path in made if path.is_file()), None):
                self._reporter.next_step(f"report of {name}", path)
            stage = self._loaded.spec.stages[name]
            if stage.effects and (artifact.path / "manifest.json").is_file():
                for reference in stage.published(artifact.path, self._loaded.name)[:_PULLED]:
                    self._reporter.next_step(
                        f"model of {name}", tracking_run.pull_command(self._loaded, reference)
                    )
        self._reporter.next_step("runs and models", tracking_run.ui_address(self._loaded))
        if waiting := tracking_run.waiting(self._loaded, self._workspace):
            self._reporter.note(str(waiting))

    def _settle(self, root: Run) -> None:
        """Close the runs that a dead driver left open and that nobody will resume."""
        going_on = {item.name: item.stage.key for item in self._plans if item.action == "run"}
        for state in list(self._ledger.state.stages.values()):
            if state.state != "running" or going_on.get(state.name) == state.key or state.run_id is None:
                continue
            artifact = self._artifact_of(state)
            run = root.child(state.name, resume_id=state.run_id)
            run.finish("KILLED" if artifact is None else "FINISHED")
            if artifact is None:
                self._ledger.append("settled", stage=state.name)
            else:
                self._workspace.drop_work(artifact.kind, artifact.key)
                fields = {"parts": state.parts, "run_id": state.run_id, "summary": artifact.manifest.summary}
                self._ledger.append("done", stage=state.name, **fields)

    def _artifact_of(self, state: StageState) -> Artifact | None:
        """What a dead attempt may have published just before it died."""
        found = self._workspace.find(state.parts.kind, state.parts.key) if state.parts else None
        return None if found is None or is_awaited(state, found) else found

    def _run_all(self, root: Run) -> None:
        """Run stages in order. One that fails takes those that need it along, and no others."""
        self._reporter.begin(self._plans)
        for item in list(self._plans):
            if self._interrupt.stop.is_set():
                self._exit_code = ABORTED
                return
            try:
                drift = self._drift(item) if item.action == "cached" and not self._lacking(item) else ()
            except Stopped:
                self._exit_code = ABORTED
                return
            if item.action == "run" or drift:
                self._mend_inputs(item, root)
            lacking = self._lacking(item)
            if item.action == "left out":
                if item.artifact is not None:
                    self._artifacts[item.name] = item.artifact
                self._reporter.left_out(item)
            elif item.action == "cached" and item.artifact is not None and not drift:
                self._artifacts[item.name] = item.artifact
                self._note_cached(item)
                sum_up(root, item.name, item.artifact.manifest.summary)
                root.tags({f"stage.{item.name}": f"cached {item.stage.key[:16]}"})
                self._reporter.cached(item)
            elif lacking:
                self._blocked(item, lacking)
            else:
                # What was put outside now is what the artifact is to say, whatever it said before.
                anew = item.anew or bool(drift)
                self._run_one(replace(item, reasons=drift or item.reasons, anew=anew), root)

    def _blocked(self, item: StagePlan, lacking: list[str]) -> None:
        self._exit_code = self._exit_code or FAILED
        self._reporter.blocked(item, lacking)

    def _missing(self, item: StagePlan) -> bool:
        """Whether a stage that was left out has not been made either."""
        return item.action == "left out" and item.artifact is None

    def _drifted(self) -> bool:
        """Whether anything outside the store is not as a stage wants it, where all stages are done."""
        self._artifacts = {item.name: item.artifact for item in self._plans if item.artifact is not None}
        drifts = [
            self._drift(item) for item in self._plans if item.action == "cached" and not self._lacking(item)
        ]
        return any(drifts)

    def _drift(self, item: StagePlan) -> tuple[str, ...]:
        """Why a stage whose artifact is there has to act again; compared once a run."""
        if not item.stage.effects:
            return ()
        if item.name not in self._drifts:
            attempt = self._attempt(item, StageState(item.name), NullRun(), fresh=False)
            with self._reporter.comparing():
                self._drifts[item.name] = tuple(attempt.drift())
        return self._drifts[item.name]

    def _lacking(self, item: StagePlan) -> list[str]:
        """What a stage needs that is not there, because it failed or was stopped."""
        return [need for need in item.stage.roles.values() if need not in self._artifacts]

    def _mend_inputs(self, item: StagePlan, root: Run) -> None:
        """Compare what a stage is about to read with its manifests, and make anew what is damaged."""
        stage = self._loaded.spec.stages[item.name]
        for role, need in item.stage.roles.items():
            self._mend(need, uncompared_in(stage, role), root)

    def _mend(self, name: str, uncompared: tuple[str, ...], root: Run) -> bool:
        """Make a stage's artifact anew if it is damaged; whether it was."""
        artifact = self._artifacts.get(name)
        if artifact is None or self._interrupt.stop.is_set():
            return False
        try:
            self._workspace.artifacts().fetch(artifact, uncompared=uncompared)
        except DamagedError as error:
            del self._artifacts[name]
            self._make_anew(name, error, root)
            return True
        return False

    def _failed_by_damage(self, item: StagePlan, outcome: Outcome, root: Run) -> bool:
        """Whether to try again: workers found an input damaged that is not compared before, and it was made anew."""
        where = outcome.error.where if isinstance(outcome.error, UserError) else None
        if outcome.state != "failed" or where is None:
            return False
        accused = {
            need
            for need in item.stage.roles.values()
            # A path on a worker's machine, or an address in the store; the folder is called the same in both.
            if (made := self._artifacts.get(need)) and folder_name(made.kind, made.key) in Path(where).parts
        }
        mended = [self._mend(need, (), root) for need in sorted(accused)]
        return any(mended) and not self._lacking(item)

    def _make_anew(self, name: str, damage: DamagedError, root: Run) -> None:
        self._reporter.note(f"the artifact of {name} is damaged and is made again: {damage.what}")
        index = next(index for index, item in enumerate(self._plans) if item.name == name)
        reasons = (f"its artifact is damaged: {damage.what}",)
        item = replace(self._plans[index], action="run", reasons=reasons, artifact=None)
        self._plans[index] = item
        self._mend_inputs(item, root)
        if lacking := self._lacking(item):
            self._blocked(item, lacking)
        elif self._interrupt.stop.is_set():
            self._exit_code = ABORTED
        else:
            self._run_one(item, root)

    def _run_one(self, item: StagePlan, root: Run) -> None:
        if self._cluster.is_wanted(item.name, self._to_come()):
            self._cluster.start(self._to_run())
            if self._interrupt.stop.is_set():
                self._exit_code = ABORTED
                return
        item = self._over_if_outdated(item)
        known = self._ledger.state.stages.get(item.name)
        goes_on = (
            known is not None and known.key == item.stage.key and known.state != "done" and not item.fresh
        )
        run_id = (known.run_id if known is not None and goes_on else None) or uuid.uuid4().hex
        self._ledger.append(
            "running",
            stage=item.name,
            parts=item.stage.parts,
            reasons=item.reasons,
            run_id=run_id,
            code=digest_of(item.stage.code),
            anew=item.anew,
        )
        state = self._ledger.state.stages[item.name]
        run = root.child(item.name, resume_id=run_id)
        self._open_runs.append(run)
        inputs = {role: self._artifacts[need] for role, need in item.stage.roles.items()}
        self._record.stage(run, root, item, inputs)
        self._reporter.started(item, state.attempts)
        with self._reporter.working(item), system_metrics.watched(root, run, item.name):
            outcome = self._attempt(item, state, run, fresh=item.fresh).execute()
            while self._cluster.is_new_after(outcome, self._to_run()):
                before = outcome.seconds
                outcome = self._attempt(item, state, run, fresh=False).execute()
                outcome.seconds += before
        if self._failed_by_damage(item, outcome, root):
            with self._reporter.working(item), system_metrics.watched(root, run, item.name):
                outcome = self._attempt(item, state, run, fresh=False).execute()
        sum_up(root, item.name, outcome.summary)
        self._conclude(item, run, run_id, outcome)

    def _to_run(self) -> list[str]:
        return [item.name for item in self._plans if item.action == "run"]

    def _to_come(self) -> list[str]:
        return [name for name in self._to_run() if name not in self._artifacts]

    def _over_if_outdated(self, item: StagePlan) -> StagePlan:
        """Let a stage start over whose unfinished work read what this very run has made anew."""
        begun = self._workspace.begun_from(item.kind, item.stage.key)
        earlier = other_inputs(begun or {}, item.stage, self._artifacts)
        if item.fresh or not earlier:
            return item
        return replace(item, fresh=True, shorter=None, reasons=(*item.reasons, begun_with(earlier)))

    def _attempt(self, item: StagePlan, state: StageState, run: Run, *, fresh: bool) -> Attempt:
        needs = {other.name: other.stage.needs for other in self._plans}
        keys = {other.name: other.stage.key for other in self._plans}
        upstream = dag.upstream(item.name, needs)
        return Attempt(
            loaded=self._loaded,
            stage=item.stage,
            number=state.attempts,
            workspace=self._workspace,
            inputs={role: self._artifacts[need] for role, need in item.stage.roles.items()},
            keys={name: keys[name] for name in upstream},
            ancestors={name: self._artifacts[name] for name in upstream if name in self._artifacts},
            run=run,
            interrupt=self._interrupt,
            anew=item.anew,
            fresh=fresh,
            forced=item.forced,
            shorter=item.shorter,
        )

    def _conclude(self, item: StagePlan, run: Run, run_id: str, outcome: Outcome) -> None:
        """Close the run first, the ledger second: a crash in between is settled by the next driver."""
        self._lease.check()
        log = self._workspace.log_path(self._loaded.name, item.name)
        if outcome.summary:
            run.metrics(outcome.summary, 0, "summary")
        run.file(log, "logs")
        if outcome.artifact is not None:
            self._record.artifact(run, item, outcome.artifact)
        # With what was fetched for MLflow to upload.
        run.metrics(self._bytes_since(), self._ledger.state.stages[item.name].attempts, "io")
        self._open_runs.remove(run)
        run.finish(_OUTCOME_STATUS[outcome.state])
        self._ledger.append(
            outcome.state,
            stage=item.name,
            parts=item.stage.parts,
            run_id=run_id,
            seconds=outcome.seconds,
            summary=outcome.summary,
            error=outcome.message,
        )
        if self._spool_backup is not None:
            self._spool_backup.flush()
        if outcome.artifact is not None:
            self._artifacts[item.name] = outcome.artifact
            self._reporter.done(item, outcome)
        elif outcome.state == "stopped":
            self._exit_code = ABORTED
            self._reporter.stopped(item, outcome)
        else:
            mistake = isinstance(outcome.error, UserError)
            self._exit_code = MISTAKE if mistake and self._exit_code != FAILED else FAILED
            self._reporter.failed(item, outcome, log)

    def _bytes_since(self) -> dict[str, int]:
        """The bytes that driver and workers read and wrote since the last stage ended: this one's."""
        before, self._counted = self._counted, BYTES.metrics()
        return {name: value - before.get(name, 0) for name, value in self._counted.items()}

    def _abort(self) -> None:
        """Best effort: the ledger keeps `running`, so the next driver resumes or closes the runs anyway."""
        self._reporter.aborted(self._plans)
        for run in reversed(self._open_runs if self._lease.lost is None else []):
            run.finish("KILLED")

    def _note_cached(self, item: StagePlan) -> None:
        """Put on record that a stage's newest key is one whose artifact was there already."""
        known = self._ledger.state.stages.get(item.name)
        on_record = known is not None and known.key == item.stage.key and known.state == "done"
        if item.action != "cached" or item.artifact is None or on_record:
            return
        summary = item.artifact.manifest.summary
        self._ledger.append("done", stage=item.name, parts=item.stage.parts, summary=summary, reused=True)


def publishing(loaded: LoadedPipeline, stages: list[ResolvedStage], *, force: bool = False) -> Choice:
    """The choice of the stages that change something outside the store, once what they need is there.

    Args:
        loaded: the pipeline.
        stages: its resolved stages.
        force: whether they act in any case.

    Raises:
        UserError: there is no such stage, or a stage that one needs is not done.
    """
    names = [stage.name for stage in stages if stage.effects]
    if not names:
        raise UserError(
            "the pipeline publishes nothing",
            where=str(loaded.path),
            hint="add a stage, such as `publish: {kind: publish, needs: distill}`",
        )
    workspace = Workspace(loaded.spec.store)
    by_name = {stage.name: stage for stage in stages}
    for need in dict.fromkeys(need for name in names for need in by_name[name].needs):
        if workspace.find(by_name[need].parts.kind, by_name[need].key) is None:
            raise UserError(
                f"there is nothing to publish: stage {need!r} is not done",
                where=loaded.where("stages", need),
                hint=f"first run: {command('run', str(loaded.path))}",
            )
    return Choice(only=tuple(names), force=tuple(names) if force else ())
