"""One attempt at one stage: its folders, its context, its log, and what came of it."""

from __future__ import annotations

import contextlib
import platform
import shlex
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator import disk
from orchestrator.config.private_values import without_secrets
from orchestrator.errors import Stopped, UserError, first_line, printable, shortened
from orchestrator.pipeline.keys.cache_key import piece_parts
from orchestrator.pipeline.keys.code_digest import PACKAGES, digest_of, versions
from orchestrator.pipeline.lease.lease_manager import Lease, LeaseLostError
from orchestrator.pipeline.load import LoadedPipeline
from orchestrator.pipeline.plan.stage_plan import ResolvedStage
from orchestrator.pipeline.run.interrupt import Interrupt, in_thread, nothing
from orchestrator.pipeline.run.stage_log import stage_log
from orchestrator.pipeline.store.workspace import Workspace, work_hold
from orchestrator.redact import redacted
from orchestrator.stages.base import PACKAGE, Context, Part, Stage, uncompared_in
from orchestrator.storage.artifacts import Artifact, folder_name
from orchestrator.storage.references import is_there
from orchestrator.tracking.run import Run

# What a stage may return: enough for any table, and names that fit into one.
_MAX_FIGURES, _MAX_NAME = 10_000, 250


@dataclass
class Outcome:
    """What came of an attempt."""

    state: Literal["done", "failed", "stopped"]
    seconds: float
    summary: dict[str, float] = field(default_factory=dict)
    artifact: Artifact | None = None
    error: Exception | None = None

    @property
    def message(self) -> str | None:
        """The error on one line, without what may be a secret."""
        if self.error is None:
            return None
        text = self.error.what if isinstance(self.error, UserError) else str(self.error)
        first = shortened(redacted(next(iter(text.strip().splitlines()), "")))
        name = type(self.error).__name__
        return first if isinstance(self.error, UserError) else f"{name}: {first}" if first else name


@dataclass(frozen=True)
class Attempt:
    """Everything one attempt needs.

    Attributes:
        inputs: artifacts by role.
        keys: those of all stages upstream.
        ancestors: the artifacts of all stages upstream that are there, by stage name.
        anew: its artifact replaces one of the same key.
        fresh: it starts over; unfinished work of the key is dropped first.
        forced: the user named the stage with `--force`.
        shorter: see :class:`Context`.
        pieces: kinds and keys of artifacts that are parts of the stage's result, filled as it runs.
    """

    loaded: LoadedPipeline
    stage: ResolvedStage
    number: int
    workspace: Workspace
    inputs: Mapping[str, Artifact]
    keys: Mapping[str, str]
    run: Run
    interrupt: Interrupt
    anew: bool = False
    fresh: bool = False
    forced: bool = False
    ancestors: Mapping[str, Artifact] = field(default_factory=dict)
    shorter: Artifact | None = None
    pieces: set[tuple[str, str]] = field(default_factory=set)

    def drift(self) -> list[str]:
        """See `Stage.drift`. What cannot be found out is a line too: running the stage then says why.

        Raises:
            Stopped: the user asked for it meanwhile.
        """
        artifacts = self.workspace.artifacts()
        stage = self.loaded.spec.stages[self.stage.name]
        work = self.workspace.work(self.stage.parts.kind, self.stage.key)
        try:
            for role, artifact in self.inputs.items():
                artifacts.fetch(artifact, uncompared=uncompared_in(stage, role))
            found = stage.drift(self._context(stage, work, work), self.loaded.spec.tracking.uri)
        except UserError as error:
            return [error.what]
        except Stopped:
            raise
        except Exception as error:
            return [f"drift failed: {type(error).__name__}: {shortened(first_line(printable(error)), 200)}"]
        if not isinstance(found, list):
            return [f"drift must return a list of texts, not {shortened(repr(found), 100)}"]
        return [shortened(str(line), 300) for line in found]

    def execute(self) -> Outcome:
        """Run the stage and publish what it wrote. Errors become an outcome; the log has the traceback."""
        started = time.monotonic()
        title = f"{self.stage.name}: attempt {self.number}, key {self.stage.key[:16]}"
        work = self.workspace.work(self.stage.parts.kind, self.stage.key)
        hold = work_hold(self.stage.parts.kind, self.stage.key)
        with (
            self.workspace.kept_log(self.loaded.name, self.stage.name) as log,
            stage_log(log, title) as logger,
        ):
            try:
                # Two pipelines in one store may want the same artifact: only one works on it.
                with self.workspace.leases.hold(hold, f"the work behind stage {self.stage.name!r}") as lease:
                    lease.on_lost = self.interrupt.stop.set
                    if self.fresh:
                        self.workspace.drop_work(self.stage.parts.kind, self.stage.key)
                    self._begin(self.stage.parts.kind, self.stage.key)
                    outcome = self._run_and_publish(work, lease)
                    self.workspace.drop_work(self.stage.parts.kind, self.stage.key)
            except LeaseLostError:
                # Whatever there is to put on record is for the one who took over.
                raise
            except Stopped:
                outcome = Outcome("stopped", 0.0)
            except Exception as error:
                # A worker that got the same Ctrl-C may die before the stage can stop: that is not a failure.
                shown = error = printable(error)
                if disk.is_full(error) and not isinstance(error, UserError):
                    shown = full_disk(error, self.workspace)
                outcome = Outcome("stopped" if self.interrupt.stop.is_set() else "failed", 0.0, error=shown)
                logger.error("%s", "".join(traceback.format_exception(error)).rstrip())
            outcome.seconds = time.monotonic() - started
            logger.info("%s after %.1f s", outcome.state, outcome.seconds)
        return outcome

    @property
    def _digests(self) -> dict[str, str]:
        """The content of what is read, by role: two artifacts of one key may differ."""
        return {role: artifact.manifest.digest for role, artifact in self.inputs.items()}

    def _begin(self, kind: str, key: str) -> None:
        """Make the folder of unfinished work, without what was begun with other inputs."""
        if self.workspace.begun_from(kind, key) not in (None, self._digests):
            self.workspace.drop_work(kind, key)
        self.workspace.work(kind, key).mkdir(parents=True, exist_ok=True)
        self.workspace.note_begun(kind, key, self._digests)

    def _run_and_publish(self, work: Path, lease: Lease) -> Outcome:
        artifacts = self.workspace.artifacts()
        out = artifacts.staging(folder_name(self.stage.parts.kind, self.stage.key))
        stage = self.loaded.spec.stages[self.stage.name]
        context = self._context(stage, out, work)
        for role, artifact in self.inputs.items():
            artifacts.fetch(artifact, uncompared=uncompared_in(stage, role))
        if self.shorter is not None:
            artifacts.fetch(self.shorter)
        try:
            watch = self.interrupt.watch if stage.uses_ray(self.loaded.spec.cluster) else nothing
            returned = in_thread(lambda: stage.run(context), watch)
        finally:
            lease.raise_if_lost()
        summary = _checked_figures(returned)
        missing = [name for name in stage.outputs if not is_there(out / name)]
        if missing:
            raise RuntimeError(
                f"the stage declares the outputs {', '.join(stage.outputs)} but did not write {', '.join(missing)}"
            )
        lease.check()
        # Pieces are artifacts of their own: from here on they can be found by the stage's.
        provenance = {**self._provenance(), "pieces": sorted(self.pieces)}
        artifact = artifacts.publish(
            self.stage.parts.kind, self.stage.key, out, provenance, summary, anew=self.anew
        )
        shutil.rmtree(out, ignore_errors=True)
        return Outcome("done", 0.0, summary, artifact)

    def _context(self, stage: Stage, out: Path, work: Path) -> Context:
        spec = self.loaded.spec
        return Context(
            name=self.stage.name,
            pipeline=spec.name,
            seed=spec.seed,
            key=self.stage.key,
            inputs=self.inputs,
            keys=self.keys,
            sources=spec.data,
            out=out,
            work=work,
            elastic=spec.elastic.overlaid(getattr(stage, "elastic", None)),
            run=self.run,
            remote=self.workspace.remote_work(self.stage.parts.kind, self.stage.key),
            stop=self.interrupt.stop,
            parts=self._part,
            modules=tuple(module for each in spec.stages.values() for module in each.modules()),
            stages={role: spec.stages[need] for role, need in self.stage.roles.items()},
            names=self.stage.roles,
            ancestors=self.ancestors,
            forced=self.forced,
            shorter=self.shorter,
            find=self._find,
        )

    def _find(self, kind: str, key: str) -> Path | None:
        artifact = self.workspace.artifacts().intact(kind, key)
        return artifact.path if artifact is not None else None

    @contextlib.contextmanager
    def _part(self, kind: str, identity: Mapping[str, Any]) -> Iterator[Part]:
        """See `Part`. Its version and what it reads are the stage's; its config is its own."""
        stage = self.loaded.spec.stages[self.stage.name]
        parts = piece_parts(stage, self.stage.parts, kind, identity)
        key = parts.key
        hold = work_hold(kind, key)
        artifacts = self.workspace.artifacts()
        first = (kind, key) not in self.pieces
        self.pieces.add((kind, key))
        with self.workspace.leases.hold(hold, f"a {kind} of stage {self.stage.name!r}") as lease:
            lease.on_lost = self.interrupt.stop.set
            # Of a piece that is there its model is read; who goes on from its checkpoint compares that.
            known = artifacts.intact(kind, key, uncompared=("checkpoint",))
            outdated = known if known is not None and self._is_outdated(known) else None
            known = None if outdated is not None else known
            if self.fresh and first and known is None:
                self.workspace.drop_work(kind, key)
            work = self.workspace.work(kind, key)
            name = str(identity.get("name", key[:8]))
            self.workspace.note_piece(self.stage.parts.kind, self.stage.key, name, kind, key)
            if known is None:
                self._begin(kind, key)

            def publish(folder: Path, summary: Mapping[str, float]) -> Path:
                lease.check()
                remote = artifacts.store.remote
                provenance = {**self._provenance(), "parts": parts.model_dump(mode="json")}
                artifact = artifacts.publish(
                    kind, key, folder, provenance, summary, anew=outdated is not None
                )
                self.workspace.drop_work(kind, key)
                # Who goes on from its weights fetches them.
                return artifacts.fetch(artifact, uncompared=("checkpoint", "model") if remote else ())

            there = known.path if known is not None else None
            yield Part(work, self.workspace.remote_work(kind, key), there, key, publish)

    def _is_outdated(self, piece: Artifact) -> bool:
        """Whether a piece that is there has to be made anew.

        Its key has the keys of what it was made from, whose content may be another since: students of an earlier
        teacher do not go with those of the present one.
        """
        made = piece.manifest.provenance
        if self.anew and made.get("run_id") != self.run.run_id:
            # What an earlier attempt of this very run has made anew is not made again.
            return True
        return "inputs" in made and made["inputs"] != self._digests

    def _provenance(self) -> dict[str, Any]:
        return {
            "pipeline": self.loaded.name,
            "stage": self.stage.name,
            "parts": self.stage.parts.model_dump(mode="json"),
            "upstream": dict(self.keys),
            "run_id": self.run.run_id,
            "command": run_command(self.loaded),
            "versions": versions(PACKAGES),
            # No reason to make anything anew, unlike those: what is published says it, whoever publishes it.
            "made_by": {"python": ".".join(platform.python_version_tuple()[:2]), **versions((PACKAGE,))},
            "code": {"digest": digest_of(self.stage.code), "files": dict(self.stage.code)},
            "inputs": self._digests,
        }


def run_command(loaded: LoadedPipeline) -> str:
    """The command that runs a pipeline as it was loaded, for any shell and without secrets."""
    overrides = dict.fromkeys(loaded.document.overrides.values())
    return shlex.join(["orchestrator", "run", str(loaded.path), *map(without_secrets, overrides)])


def full_disk(error: BaseException, workspace: Workspace) -> UserError:
    """What to say of a disk without room, in place of the error that came of it."""
    # Ray's own files, and what is in the making, are in the system's folder for such things.
    what = disk.described(error, [workspace.root, disk.temporary()])
    return UserError(
        what,
        hint="free some space on it and run the same command again: finished stages and complete checkpoints are "
        "kept, and the run continues from there",
    )


def _checked_figures(returned: object) -> dict[str, float]:
    """What `run` of a stage returned, as figures; a user's package may return anything.

    Raises:
        UserError: they are none.
    """
    hint = "return a mapping of names to numbers, such as {'last_loss': 0.5}, or {}"
    if not isinstance(returned, Mapping):
        raise UserError(f"`run` returned {shortened(repr(returned), 100)}, which is not a mapping", hint=hint)
    if len(returned) > _MAX_FIGURES:
        raise UserError(f"`run` returned {len(returned):,} figures, more than {_MAX_FIGURES:,}", hint=hint)
    figures = {}
    for name, value in returned.items():
        if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME or not name.isprintable():
            raise UserError(f"`run` returned a figure called {shortened(repr(name), 100)}", hint=hint)
        try:
            figures[name] = float(value)
        except (TypeError, ValueError, OverflowError):
            what = f"`run` returned {shortened(repr(value), 100)} as the figure {name!r}"
            raise UserError(what, hint=hint) from None
    return figures
