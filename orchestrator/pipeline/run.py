"""Running a pipeline: what is done is skipped, what was broken off goes on, and the ledger knows it all."""

from __future__ import annotations

import contextlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from orchestrator import disk
from orchestrator.config.elastic import Elastic
from orchestrator.config.schema import Cluster
from orchestrator.elastic.cluster import JoinedCluster
from orchestrator.errors import ClusterLostError, Stopped, UserError
from orchestrator.pipeline import dag, mlflow_record, system_metrics, tracking_run
from orchestrator.pipeline.attempt import Attempt, Outcome, full_disk
from orchestrator.pipeline.check import check_cluster
from orchestrator.pipeline.code_digest import digest_of
from orchestrator.pipeline.console import Reporter
from orchestrator.pipeline.interrupt import ABORTED, Interrupt
from orchestrator.pipeline.lease import Lease, LeaseLostError
from orchestrator.pipeline.ledger import StageState
from orchestrator.pipeline.load import LoadedPipeline
from orchestrator.pipeline.plan import (
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
from orchestrator.pipeline.workspace import Workspace
from orchestrator.shell_command import command
from orchestrator.stages.base import TrainStage
from orchestrator.storage.artifacts import Artifact, DamagedError
from orchestrator.tracking.run import NullRun, Run, Status
from orchestrator.tracking.spool import clean_name

logger = logging.getLogger("orchestrator")

DONE, FAILED, MISTAKE = 0, 1, 2
# What a stage makes to be looked at: a page, or else lists.
REPORTS = ("report.html", "report.json")
# A cluster that is lost more often than that is not lost by chance.
_MOST_LOSSES, _WITHIN_S = 3, 3600.0
_STATUS: dict[int, Status] = {DONE: "FINISHED", ABORTED: "KILLED"}
_NOT_FINISHED: dict[str, Status] = {"FAILED": "FAILED", "KILLED": "KILLED"}
_OUTCOME_STATUS: dict[str, Status] = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}

StartCluster = Callable[[Cluster], AbstractContextManager[Any]]
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
            training = _training(loaded, stages)
            start = start_cluster or partial(_start_cluster, training, loaded.spec.elastic, reporter.note)
            return _Driver(loaded, stages, workspace, lease, reporter, start, open_tracking, choice).execute()
    except LeaseLostError as error:
        reporter.lost(str(error))
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
        self._start_cluster = start_cluster
        self._ledger = workspace.ledger(loaded.name, lease)
        self._plans = plan(
            stages,
            self._ledger.state,
            workspace.find,
            reached=workspace.reached,
            begun_from=workspace.begun_from,
            choice=choice,
        )
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
        self._cluster_started = False
        self._losses: list[float] = []
        self._drifts: dict[str, tuple[str, ...]] = {}

    def execute(self) -> int:
        if not needs_attention(self._plans, self._ledger.state) and not self._drifted():
            for item in self._plans:
                self._note_cached(item)
                if item.action == "cached" and item.stage.effects and (lacking := self._lacking(item)):
                    text = f"what {item.name} publishes was not compared with the registry: not done: "
                    self._reporter.note(text + ", ".join(lacking))
            tracking_run.send_leftovers(self._loaded, self._workspace, self._reporter.note)
            self._reporter.nothing_to_do(self._plans, list(self._drifts))
            self._tell_rest()
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
                self._record_pipeline(root)
                self._settle(root)
                with ExitStack() as cluster:
                    self._run_all(root, cluster)
                status = _STATUS.get(self._exit_code, "FAILED")
                if status == "FINISHED" and any(self._missing(item) for item in self._plans):
                    # Some of the pipeline is missing still: it has not finished because a part of it has.
                    status = _NOT_FINISHED.get(before or "", "KILLED")
                self._record_results(root)
            finally:
                # The runs of a pipeline that another driver took over are that one's to finish.
                self._lease.check()
                self._open_runs.remove(root)
                root.finish(status)
                self._ledger.append("closed", status=status)
        self._reporter.finished(self._plans, self._ledger.state, self._exit_code)
        self._tell_rest()
        return self._exit_code

    def _tell_rest(self) -> None:
        """Where the reports are, and what MLflow has not taken yet."""
        for name, artifact in self._artifacts.items():
            # One that another machine made is in the remote store only.
            made = (artifact.path / report for report in REPORTS if report in artifact.manifest.files)
            if path := next((path for path in made if path.is_file()), None):
                self._reporter.report(name, path)
        if waiting := tracking_run.waiting(self._loaded, self._workspace):
            self._reporter.note(str(waiting))

    def _record_pipeline(self, root: Run) -> None:
        """Keep the resolved file in the store and in the pipeline's run."""
        name = f"pipelines/{self._loaded.name}/pipeline.yaml"
        path = self._workspace.record(name, self._loaded.resolved().encode())
        root.tags({"orchestrator.pipeline": self._loaded.name, "orchestrator.file": str(self._loaded.path)})
        root.file(path, "pipeline")
        with _telling():
            mlflow_record.describe(root, self._loaded)
            root.tags(
                {
                    mlflow_record.NOTE: mlflow_record.pipeline_note(
                        self._loaded, self._plans, self._ledger.state
                    )
                }
            )

    def _record_results(self, root: Run) -> None:
        """Every artifact by address and digest, what it was made of, and the figures of each stage."""
        with _telling():
            references = mlflow_record.references(self._workspace, self._artifacts)
            root.text("artifacts.json", json.dumps(references, indent=1) + "\n")
            root.tags(
                {
                    mlflow_record.NOTE: mlflow_record.pipeline_note(
                        self._loaded, self._plans, self._ledger.state
                    )
                }
            )

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

    def _run_all(self, root: Run, cluster: ExitStack) -> None:
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
                self._mend_inputs(item, root, cluster)
            lacking = self._lacking(item)
            if item.action == "left out":
                if item.artifact is not None:
                    self._artifacts[item.name] = item.artifact
                self._reporter.left_out(item)
            elif item.action == "cached" and item.artifact is not None and not drift:
                self._artifacts[item.name] = item.artifact
                self._note_cached(item)
                _sum_up(root, item.name, item.artifact.manifest.summary)
                root.tags({f"stage.{item.name}": f"cached {item.stage.key[:16]}"})
                self._reporter.cached(item)
            elif lacking:
                self._blocked(item, lacking)
            else:
                # What was put outside now is what the artifact is to say, whatever it said before.
                anew = item.anew or bool(drift)
                self._run_one(replace(item, reasons=drift or item.reasons, anew=anew), root, cluster)

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
            run = NullRun()
            self._drifts[item.name] = tuple(
                self._attempt(item, StageState(item.name), run, fresh=False).drift()
            )
        return self._drifts[item.name]

    def _lacking(self, item: StagePlan) -> list[str]:
        """What a stage needs that is not there, because it failed or was stopped."""
        return [need for need in item.stage.roles.values() if need not in self._artifacts]

    def _mend_inputs(self, item: StagePlan, root: Run, cluster: ExitStack) -> None:
        """Compare what a stage is about to read with its manifests, and make anew what is damaged."""
        for need in dict.fromkeys(item.stage.roles.values()):
            artifact = self._artifacts.get(need)
            if artifact is None or self._interrupt.stop.is_set():
                continue
            try:
                self._workspace.artifacts().fetch(artifact)
            except DamagedError as error:
                del self._artifacts[need]
                self._make_anew(need, error, root, cluster)

    def _make_anew(self, name: str, damage: DamagedError, root: Run, cluster: ExitStack) -> None:
        self._reporter.note(f"the artifact of {name} is damaged and is made again: {damage.what}")
        index = next(index for index, item in enumerate(self._plans) if item.name == name)
        reasons = (f"its artifact is damaged: {damage.what}",)
        item = replace(self._plans[index], action="run", reasons=reasons, artifact=None)
        self._plans[index] = item
        self._mend_inputs(item, root, cluster)
        if lacking := self._lacking(item):
            self._blocked(item, lacking)
        elif self._interrupt.stop.is_set():
            self._exit_code = ABORTED
        else:
            self._run_one(item, root, cluster)

    def _run_one(self, item: StagePlan, root: Run, cluster: ExitStack) -> None:
        if self._wants_cluster(item):
            self._enter_cluster(cluster)
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
        self._describe(run, root, item)
        self._reporter.started(item, state.attempts)
        with self._reporter.working(item), system_metrics.watched(root, run, item.name):
            outcome = self._attempt(item, state, run, fresh=item.fresh).execute()
            while self._has_new_cluster(outcome, cluster):
                before = outcome.seconds
                outcome = self._attempt(item, state, run, fresh=False).execute()
                outcome.seconds += before
        _sum_up(root, item.name, outcome.summary)
        self._conclude(item, run, run_id, outcome)

    def _over_if_outdated(self, item: StagePlan) -> StagePlan:
        """Let a stage start over whose unfinished work read what this very run has made anew."""
        begun = self._workspace.begun_from(item.kind, item.stage.key)
        earlier = other_inputs(begun or {}, item.stage, self._artifacts)
        if item.fresh or not earlier:
            return item
        return replace(item, fresh=True, reasons=(*item.reasons, begun_with(earlier)))

    def _enter_cluster(self, cluster: ExitStack) -> None:
        address = self._loaded.spec.cluster.address
        self._reporter.starting_cluster(address)
        try:
            running = cluster.enter_context(self._start_cluster(self._loaded.spec.cluster))
        except Stopped:
            return
        except UserError as error:
            where = None if address == "local" else self._loaded.where("cluster", "address")
            raise UserError(error.what, where=error.where or where, hint=error.hint) from error
        self._interrupt.watch = getattr(running, "check", self._interrupt.watch)
        if isinstance(running, JoinedCluster):
            # Of an own one, which is this machine, all was known before.
            self._look_around()
        if url := getattr(running, "dashboard_url", ""):
            self._reporter.note(f"Ray's dashboard is at {url}; its access token is in {running.token_file}")
        self._cluster_started = True

    def _wants_cluster(self, item: StagePlan) -> bool:
        """Whether the cluster has to be there before this stage runs.

        An own one is started before the first stage if any that is to come needs it: worker slots then import what
        they need while `curate` runs. It cannot start beside a stage, since Ray forks this process, and a fork
        while another thread computes in OpenBLAS may never return.
        """
        if self._cluster_started:
            return False
        stages = self._loaded.spec.stages
        if stages[item.name].needs_ray or self._loaded.spec.cluster.address != "local":
            return stages[item.name].needs_ray
        to_come = [item for item in self._plans if item.action == "run" and item.name not in self._artifacts]
        return any(stages[item.name].needs_ray for item in to_come)

    def _look_around(self) -> None:
        """Tell what the machines of the cluster lack.

        Raises:
            UserError: none of them sees the photos, or the store.
        """
        names = [item.name for item in self._plans if item.action == "run"]
        found = check_cluster(self._loaded, names, self._workspace)
        for warning in found.warnings:
            self._reporter.warning(warning)
        found.raise_if_any()

    def _has_new_cluster(self, outcome: Outcome, cluster: ExitStack) -> bool:
        """Whether an attempt ended only because its cluster was lost, and there is a new one to go on with."""
        lost = outcome.error
        if not isinstance(lost, ClusterLostError):
            return False
        cluster.close()
        self._cluster_started = False
        if self._interrupt.stop.is_set():
            outcome.state, outcome.error = "stopped", None
            return False
        if not lost.own:
            return False
        now = time.monotonic()
        self._losses = [at for at in self._losses if now - at < _WITHIN_S] + [now]
        if len(self._losses) > _MOST_LOSSES:
            outcome.error = RuntimeError(f"{lost}, for the {len(self._losses)}th time within an hour")
            return False
        logger.warning("%s: a new one is started, and the stage continues from its latest checkpoint", lost)
        try:
            self._enter_cluster(cluster)
        except UserError as error:
            outcome.error = error
            return False
        if self._interrupt.stop.is_set():
            outcome.state, outcome.error = "stopped", None
        return self._cluster_started and not self._interrupt.stop.is_set()

    def _attempt(self, item: StagePlan, state: StageState, run: Run, *, fresh: bool) -> Attempt:
        needs = {other.name: other.stage.needs for other in self._plans}
        keys = {other.name: other.stage.key for other in self._plans}
        return Attempt(
            loaded=self._loaded,
            stage=item.stage,
            number=state.attempts,
            workspace=self._workspace,
            inputs={role: self._artifacts[need] for role, need in item.stage.roles.items()},
            keys={name: keys[name] for name in dag.upstream(item.name, needs)},
            run=run,
            interrupt=self._interrupt,
            anew=item.anew,
            fresh=fresh,
        )

    def _conclude(self, item: StagePlan, run: Run, run_id: str, outcome: Outcome) -> None:
        """Close the run first, the ledger second: a crash in between is settled by the next driver."""
        self._lease.check()
        log = self._workspace.log_path(self._loaded.name, item.name)
        if outcome.summary:
            run.metrics(outcome.summary, 0, "summary")
        run.file(log, "logs")
        if outcome.artifact is not None:
            with _telling():
                self._record_artifact(run, item, outcome.artifact)
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

    def _record_artifact(self, run: Run, item: StagePlan, artifact: Artifact) -> None:
        (own, *pieces) = mlflow_record.references(self._workspace, {item.name: artifact})[item.name]
        run.text("artifacts.json", json.dumps([own, *pieces], indent=1) + "\n")
        run.tags(
            {f"orchestrator.artifact.{name}": own[name] for name in ("uri", "sha256_of_manifest", "bytes")}
        )
        for model in mlflow_record.models(self._loaded, self._workspace, item.stage, artifact):
            run.model(model)

    def _describe(self, run: Run, root: Run, item: StagePlan) -> None:
        parts = item.stage.parts
        inputs = {role: self._artifacts[need] for role, need in item.stage.roles.items()}
        with _telling():
            used = mlflow_record.datasets(self._loaded, self._workspace, item.stage, inputs.values())
            run.datasets(used)
            root.datasets(used)
            mlflow_record.describe(run, self._loaded)
            run.tags({mlflow_record.NOTE: mlflow_record.stage_note(item, inputs, used)})
        run.params(parts.config)
        run.tags(
            {
                "orchestrator.stage": item.name,
                "orchestrator.kind": parts.kind,
                "orchestrator.key": item.stage.key,
                "orchestrator.kind_version": str(parts.version),
                "orchestrator.code": digest_of(item.stage.code),
                "orchestrator.reasons": "; ".join(item.reasons),
                **{f"orchestrator.input.{role}": key for role, key in parts.inputs.items()},
                **{f"orchestrator.data.{name}": value for name, value in parts.data.items()},
            }
        )

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


@contextlib.contextmanager
def _telling() -> Iterator[None]:
    """What MLflow is told is not worth a stage: trouble with it is a warning."""
    try:
        yield
    except LeaseLostError:
        raise
    except Exception as error:  # a store that is away, a file that somebody removed
        logger.warning("MLflow is missing a record: %s: %s", type(error).__name__, error)


def _sum_up(root: Run, stage: str, summary: Mapping[str, float]) -> None:
    """A stage's figures on the pipeline's run: a further point only where they changed since the last."""
    channel = f"summary/{stage}"
    known = root.history(channel)
    # As text: a figure may be NaN, which equals nothing.
    text = json.dumps({clean_name(name): float(value) for name, value in summary.items()})
    if summary and (not known or json.dumps(known[-1]["metrics"]) != text):
        root.metrics(summary, len(known), channel)


def publishing(loaded: LoadedPipeline, stages: list[ResolvedStage]) -> Choice:
    """The choice of the stages that change something outside the store, once what they need is there.

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
    return Choice(only=tuple(names))


def _training(loaded: LoadedPipeline, stages: list[ResolvedStage]) -> dict[str, TrainStage]:
    specs = {stage.name: loaded.spec.stages[stage.name] for stage in stages}
    return {name: spec for name, spec in specs.items() if isinstance(spec, TrainStage)}


def _start_cluster(
    training: dict[str, TrainStage], default: Elastic, say: Callable[[str], None], cluster: Cluster
) -> AbstractContextManager[Any]:
    from orchestrator.elastic.cluster import start

    preload = {module for stage in training.values() for module in stage.preload}
    sections = [default.overlaid(stage.elastic) for stage in training.values()]
    # `workers: auto` takes as many as the cluster turns out to have: that is known when the job asks.
    workers = [section.workers[0 if section.every_device else 1] for section in sections]
    return start(cluster, sorted(preload), max(workers, default=0), default, say)
