"""The cluster of a run: started when a stage first needs it, and anew when it is lost."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self

from orchestrator.config.elastic import Elastic
from orchestrator.config.schema import Cluster
from orchestrator.elastic.cluster import JoinedCluster
from orchestrator.errors import ClusterLostError, Stopped, UserError
from orchestrator.pipeline.check.pipeline_check import check_cluster
from orchestrator.pipeline.console import Reporter
from orchestrator.pipeline.load import LoadedPipeline
from orchestrator.pipeline.plan.stage_plan import ResolvedStage
from orchestrator.pipeline.run.attempt import Outcome
from orchestrator.pipeline.run.interrupt import Interrupt
from orchestrator.pipeline.store.workspace import Workspace
from orchestrator.stages.base import TrainStage

logger = logging.getLogger("orchestrator")

# A cluster that is lost more often than that is not lost by chance.
_MOST_LOSSES, _WITHIN_S = 3, 3600.0

StartCluster = Callable[[Cluster], AbstractContextManager[Any]]


class RunCluster:
    """Starts, joins and renews the cluster of one run; a context manager, at whose end it is left.

    Args:
        loaded: the pipeline.
        workspace: its store.
        reporter: tells the user.
        interrupt: of the run; it watches the cluster.
        start_cluster: makes Ray available.
    """

    def __init__(
        self,
        loaded: LoadedPipeline,
        workspace: Workspace,
        reporter: Reporter,
        interrupt: Interrupt,
        start_cluster: StartCluster,
    ) -> None:
        self._loaded, self._workspace, self._reporter = loaded, workspace, reporter
        self._interrupt, self._start_cluster = interrupt, start_cluster
        self._running = ExitStack()
        self._started = False
        self._losses: list[float] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._running.__exit__(kind, error, trace)

    def is_wanted(self, stage: str, to_come: Sequence[str]) -> bool:
        """Whether the cluster has to be started before a stage runs.

        An own one is started before the first stage if any of those `to_come` needs it: worker slots then import what
        they need while `curate` runs. It cannot start beside a stage, since Ray forks this process, and a fork
        while another thread computes in OpenBLAS may never return.
        """
        if self._started:
            return False
        stages, cluster = self._loaded.spec.stages, self._loaded.spec.cluster
        if stages[stage].uses_ray(cluster) or cluster.address != "local":
            return stages[stage].uses_ray(cluster)
        return any(stages[name].uses_ray(cluster) for name in to_come)

    def start(self, to_run: Sequence[str]) -> None:
        """Start or join it. If the user stops that, the run's interrupt is set and there is none.

        Args:
            to_run: the stages that run in this run, for the checks of a cluster that is joined.

        Raises:
            UserError: it cannot be had, or none of its machines sees the photos or the store.
        """
        address = self._loaded.spec.cluster.address
        self._reporter.starting_cluster(address)
        try:
            running = self._running.enter_context(self._start_cluster(self._loaded.spec.cluster))
        except Stopped:
            return
        except UserError as error:
            where = None if address == "local" else self._loaded.where("cluster", "address")
            raise UserError(error.what, where=error.where or where, hint=error.hint) from error
        self._interrupt.watch = getattr(running, "check", self._interrupt.watch)
        if isinstance(running, JoinedCluster):
            # Of an own one, which is this machine, all was known before.
            self._check(to_run)
        if url := getattr(running, "dashboard_url", ""):
            self._reporter.note(f"Ray's dashboard is at {url}; its access token is in {running.token_file}")
        self._started = True

    def is_new_after(self, outcome: Outcome, to_run: Sequence[str]) -> bool:
        """Whether an attempt ended only because its cluster was lost, and there is a new one to go on with.

        Otherwise the outcome says from then on what became of the attempt.
        """
        lost = outcome.error
        if not isinstance(lost, ClusterLostError):
            return False
        self._running.close()
        self._started = False
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
            self.start(to_run)
        except UserError as error:
            outcome.error = error
            return False
        if self._interrupt.stop.is_set():
            outcome.state, outcome.error = "stopped", None
        return self._started and not self._interrupt.stop.is_set()

    def _check(self, to_run: Sequence[str]) -> None:
        """Tell what the machines of a joined cluster lack.

        Raises:
            UserError: none of them sees the photos, or the store.
        """
        found = check_cluster(self._loaded, list(to_run), self._workspace)
        for warning in found.warnings:
            self._reporter.warning(warning)
        found.raise_if_any()


def starting_cluster(
    loaded: LoadedPipeline, stages: Sequence[ResolvedStage], say: Callable[[str], None]
) -> StartCluster:
    """What starts the cluster of a pipeline, with worker slots for what its stages train."""
    specs = (loaded.spec.stages[stage.name] for stage in stages)
    training = [spec for spec in specs if isinstance(spec, TrainStage)]
    return partial(_start, training, loaded.spec.elastic, say)


def _start(
    training: Sequence[TrainStage], default: Elastic, say: Callable[[str], None], cluster: Cluster
) -> AbstractContextManager[Any]:
    from orchestrator.elastic.cluster import start

    preload = {module for stage in training for module in stage.preload}
    sections = [default.overlaid(stage.elastic) for stage in training]
    # `workers: auto` takes as many as the cluster turns out to have: that is known when the job asks.
    workers = [section.workers[0 if section.every_device else 1] for section in sections]
    return start(cluster, sorted(preload), max(workers, default=0), default, say)
