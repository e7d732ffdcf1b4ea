"""Runs one elastic job: forms groups of workers on warm seats, hears of losses and notices, and goes on.

A loop in the driver: look at what happened, settle what ended, ask `policy.decide`, act. It waits for nothing but
news. A loss is known when the first survivor's connection breaks, which is long before any health check: all
workers of the group are killed at once, and the next group is formed of the seats that still answer.
"""

from __future__ import annotations

import logging
import pickle
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from orchestrator.elastic import fleet as fleets
from orchestrator.elastic import policy
from orchestrator.elastic.fleet import Fleet
from orchestrator.elastic.goodput import Goodput, Recovery, report_figures
from orchestrator.elastic.group import Ended, Group, Lost
from orchestrator.elastic.job import Job
from orchestrator.errors import Stopped, UserError
from orchestrator.tracking.runs import Run

logger = logging.getLogger("orchestrator")

_LOOK_S = 0.25
_LINE_EVERY_S = 10.0
_FIGURES_EVERY_S = 5.0
_PLACING_S = 3.0
_ACCOUNT = "goodput.json"


def run(
    job: Job, *, tracker: Run, stop: threading.Event, on_line: Callable[[str], None] = logger.info
) -> dict[str, float]:
    """Train `job` on the connected cluster until its last step is done.

    Args:
        job: what to train.
        tracker: the run that gets its metrics.
        stop: when set, the job checkpoints and ends.
        on_line: gets a progress line every few seconds, and one for each event.

    Returns:
        The job's goodput and what was lost, for a summary.

    Raises:
        Stopped: `stop` was set and the job is checkpointed.
        UserError: a mistake found inside a worker.
        RuntimeError: the job failed; the worker's exception is the message.
    """
    if not job.is_done():
        _Controller(job, tracker, stop, on_line).run()
    job.fetch()
    return report_figures(Goodput.load(job.work / _ACCOUNT))


@dataclass
class _Progress:
    """The newest figures of worker 0, and when they came (monotonic)."""

    step: int = 0
    figures: dict[str, float] | None = None
    at: float = 0.0
    step_s: float | None = None


class _Controller:
    def __init__(self, job: Job, tracker: Run, stop: threading.Event, on_line: Callable[[str], None]) -> None:
        self.job, self.tracker, self.stop, self.on_line = job, tracker, stop, on_line
        self.fleet: Fleet = fleets.current()
        job.work.mkdir(parents=True, exist_ok=True)
        self.goodput = Goodput.load(job.work / _ACCOUNT)
        self.budget = policy.Budget(job.elastic.max_failures)
        self.group: Group | None = None
        self.recovery: Recovery | None = None
        self.progress = _Progress()
        self.pickled = pickle.dumps(job.for_workers())
        self.ready_since: float | None = None
        self.began = time.monotonic()
        self.losses = 0
        self.restart_s = 5.0
        self.workers = (0, 0)
        self.told_line = self.told_figures = time.monotonic()
        self.waits_for = ""
        self.waits_since: float | None = None
        self.recorder = ThreadPoolExecutor(1, thread_name_prefix=f"record-{job.name}")

    def run(self) -> None:
        self.goodput.begin(time.time())
        try:
            while not self._over():
                self._want()
                self._decide()
                self._tell()
                self.fleet.look(_LOOK_S)
                if self.group is not None:
                    self._listen(self.group)
        finally:
            if self.group is not None:
                self.group.kill()
            self.fleet.leave(self.job.name)
            self.group = None
            self.recorder.shutdown(cancel_futures=True)
            self._account(last=True)

    def _want(self) -> None:
        """Ask the fleet for as many seats as the job may use now."""
        elastic = self.job.elastic
        workers = elastic.workers if self.job.limit is None else self.job.limit()
        if workers != self.workers:
            self.workers = workers
            self.fleet.want(self.job.name, *workers, fleets.shape(elastic.device, self.job.gpus_per_worker))

    def _over(self) -> bool:
        if self.group is not None:
            return False
        if self.stop.is_set():
            self.goodput.stopped = True
            raise Stopped(f"{self.job.name} is checkpointed")
        return self.job.is_done()

    # --- listening --------------------------------------------------------------------------------------------

    def _listen(self, group: Group) -> None:
        for event in group.news():
            match event["kind"]:
                case "step":
                    self._stepped(group, event)
                case "record":
                    self.recorder.submit(self._record, group, event["step"])
                case "saved":
                    self.goodput.saved(event["step"])
                    self._account()
                    self.tracker.metrics(event["figures"], event["step"], "checkpoint")
                case "trouble":
                    logger.warning("%s: %s", self.job.name, event["what"])
                    self.on_line(f"{self.job.name}: {event['what']}")
                case "phase":
                    self.progress.at = time.monotonic()
                    if self.recovery is not None:
                        self.recovery.marks[event["name"]] = event["time"]
                    if event["name"] == "restored":
                        group.restored = True
        ended = group.verdict(self.fleet, self.job.elastic.silence_s, self._hung())
        if ended is not None:
            self._end(group, ended)

    def _record(self, group: Group, step: int) -> None:
        """Tell the workers once the curve up to `step` is where no lost machine can take it."""
        while not self.tracker.secure():
            if self.group is not group:
                return
            time.sleep(_LOOK_S)
        group.tell(0, {"op": "recorded", "step": step})

    def _stepped(self, group: Group, event: dict[str, Any]) -> None:
        now, step = time.time(), int(event["step"])
        self.tracker.metrics(event["figures"], step)
        if not group.stepped:
            group.stepped = True
            self.goodput.resumed(step - 1)
            self._recovered(group, step, now)
        self.goodput.stepped(step, event["figures"]["step_seconds"], event["stall"], now)
        self.budget.progress(step)
        seconds = event["figures"]["step_seconds"]
        known = self.progress.step_s
        self.progress = _Progress(
            step,
            event["figures"],
            time.monotonic(),
            seconds if known is None else 0.7 * known + 0.3 * seconds,
        )

    def _recovered(self, group: Group, step: int, now: float) -> None:
        recovery, self.recovery = self.recovery, None
        if recovery is None:
            return
        recovery.first_step, recovery.resumed_at, recovery.workers = now, step - 1, len(group.places)
        self.goodput.recoveries.append(recovery)
        took = now - recovery.detected
        self.restart_s = 0.5 * self.restart_s + 0.5 * took
        self.on_line(
            f"{self.job.name}: goes on from step {step - 1} with {len(group.places)} workers after {took:.1f} s"
        )

    def _hung(self) -> float | None:
        """The seconds without any progress, if they are too many."""
        quiet = time.monotonic() - self.progress.at
        return quiet if quiet > max(self.job.elastic.hang_s, 10 * (self.progress.step_s or 0.0)) else None

    # --- a group's end ----------------------------------------------------------------------------------------

    def _end(self, group: Group, ended: Ended) -> None:
        now = time.time()
        last = now - (time.monotonic() - self.progress.at)
        group.kill()
        self.group = None
        self.ready_since = None
        self.progress.step_s = None
        self.goodput.ended(ended.planned, now)
        self.recovery = Recovery(ended.cause, ended.planned, last, now)
        for name in ended.silent:
            self.fleet.give_up(name)
        self.fleet.give_back(self.job.name)
        if not ended.planned:
            self.losses += 1
            self.on_line(f"{self.job.name}: {ended.cause}")
        match ended.lost:
            case Lost.NOTHING:
                self.goodput.count("resizes", int(not self.job.is_done()))
                return
            case Lost.MACHINE:
                self.budget.preempted()
                self.goodput.count("preemptions")
            case Lost.PROCESS:
                if self.budget.broke(ended.cause):
                    raise RuntimeError(
                        f"{self.job.name} gets nowhere: {ended.cause}, {self.budget.stalled} times in a row"
                    )
            case Lost.TASK:
                self.goodput.count("failures")
                self._failed(ended)
        self.goodput.count("restarts")

    def _failed(self, ended: Ended) -> None:
        error = ended.error
        assert error is not None
        if (mistake := error.get("mistake")) is not None:
            raise UserError(mistake["what"], where=mistake["where"], hint=mistake["hint"])
        logger.error("%s failed in a worker:\n%s", self.job.name, error["traceback"].rstrip())
        if self.budget.failed(max(self.progress.step, 0), error["type"]):
            again = f" (and {self.budget.failures - 1} before)" if self.budget.failures > 1 else ""
            raise RuntimeError(f"{self.job.name} failed: {error['type']}: {error['message']}{again}")

    # --- deciding ---------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        if self.stop.is_set():
            if self.group is not None and not self.group.yielding:
                self.group.yield_("stop")
            return
        decision = policy.decide(self._view())
        if isinstance(decision, policy.Form):
            self._form(decision)
        elif isinstance(decision, policy.Yield) and self.group is not None:
            self.on_line(f"{self.job.name}: {decision.reason}: checkpointing")
            self.group.yield_(decision.reason)
        elif isinstance(decision, policy.Wait):
            self._wait(decision.reason)

    def _wait(self, reason: str) -> None:
        """Book the time without machines, and say so once it is more than a seat takes to be placed."""
        now = time.monotonic()
        if self.waits_since is None:
            self.waits_since = now
        if self.fleet.warming(self.job.name):
            return
        self.goodput.become("waiting", time.time())
        if now - self.waits_since > _PLACING_S and reason != self.waits_for:
            self.waits_for = reason
            self.on_line(f"{self.job.name}: {reason}")

    def _view(self) -> policy.JobView:
        now = time.monotonic()
        places = self.fleet.on_offer(self.job.name)
        group = self.group
        if self.ready_since is None and sum(not place.leaving for place in places) >= self.workers[0]:
            self.ready_since = now
        return policy.JobView(
            workers=self.workers,
            num_blocks=self.job.num_blocks,
            seats=tuple(policy.SeatView(place.name, place.node, place.leaving) for place in places),
            group=tuple(place.name for place in group.places) if group else (),
            yielding=group is not None and group.yielding,
            warming=self.fleet.warming(self.job.name),
            stepped=self.goodput.useful > 0,
            waited_s=now - self.ready_since if self.ready_since is not None else 0.0,
            since_resize_s=now - group.formed if group else 0.0,
            step_s=self.progress.step_s,
            steps_left=self.job.num_steps - self.progress.step,
            restart_s=self.restart_s,
            resize_share=self.job.elastic.resize_share,
        )

    def _form(self, form: policy.Form) -> None:
        places = self.fleet.take(self.job.name, form.seats)
        if places is None:
            return
        now = time.time()
        self.waits_for, self.waits_since = "", None
        self.goodput.become("restart", now)
        if self.recovery is not None:
            self.recovery.decided = now
        self.progress.at = time.monotonic()
        mtbf = policy.mtbf(time.monotonic() - self.began, self.losses)
        self.group = Group(self.job, places, secrets.token_hex(4))
        self.group.begin(self.pickled, mtbf)

    # --- telling ----------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        now = time.monotonic()
        figures = self.progress.figures
        if now - self.told_line >= _LINE_EVERY_S and self.group is not None and figures is not None:
            self.told_line = now
            self.on_line(_line(self.job, self.progress.step, figures))
        if now - self.told_figures >= _FIGURES_EVERY_S:
            self.told_figures = now
            self._account()

    def _account(self, *, last: bool = False) -> None:
        figures = self.goodput.figures(time.time())
        workers = len(self.group.places) if self.group is not None else 0
        # By seconds, not by steps: while nothing is trained no step passes.
        self.tracker.metrics({**figures, "workers": float(workers)}, int(figures["seconds_total"]), "goodput")
        try:
            self.goodput.save(self.job.work / _ACCOUNT)
        except OSError as error:
            # A full disk costs the account, and the checkpoints, which say so themselves.
            logger.warning("%s: the account of its time is not kept: %s", self.job.name, error)
        if last:
            logger.info(
                "%s: %s", self.job.name, ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
            )


def _line(job: Job, step: int, figures: dict[str, float]) -> str:
    left = (job.num_steps - step) * figures["step_seconds"]
    return (
        f"{job.name}: step {step}/{job.num_steps}, loss {figures['loss']:.3f}, "
        f"{figures['step_seconds']:.2f} s a step, about {left:.0f} s to go"
    )
