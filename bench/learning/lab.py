"""Runs real stages, several at once: each an elastic job of one worker on an own Ray cluster."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from orchestrator.config.elastic import Elastic
from orchestrator.config.schema import Cluster
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.elastic import cluster
from orchestrator.stages.base import Context, Stage
from orchestrator.storage.artifacts import Artifact
from orchestrator.storage.manifest import Manifest
from orchestrator.tracking.run import NullRun

T = TypeVar("T")
_PRELOAD = tuple(
    f"orchestrator.stages.{module}"
    for module in ("ssl.task", "distill.task", "align_text.task", "align_text.captions")
)


@dataclass(frozen=True)
class Trained:
    """What a stage left: its artifact's folder, its key, and the seconds that its run took."""

    path: Path
    key: str
    seconds: float


class Lab:
    """Makes artifacts; one that is in its folder already is not made again. `made` counts those that were.

    Args:
        folder: where artifacts go.
        seeds: of the runs that every experiment repeats.
        quick: whether this is the small form, which shows that everything works.
        say: gets a line for each stage that is done.
    """

    def __init__(self, folder: Path, seeds: Sequence[int], quick: bool, say: Callable[[str], None]) -> None:
        self.folder, self.seeds, self.quick, self._say = folder, seeds, quick, say
        self.made = 0

    def index(self, rows: Sequence[ImageRecord]) -> Trained:
        """A photo index as an artifact."""
        key = _hash([(row.component, row.sha256) for row in rows])
        path = self.folder / f"index-{key}"
        if not path.exists():
            draft = path.with_suffix(".partial")
            draft.mkdir(parents=True, exist_ok=True)
            ImageIndex(rows).save(draft)
            draft.rename(path)
        return Trained(path, key, 0.0)

    def train(
        self,
        name: str,
        stage: Stage,
        seed: int,
        inputs: Mapping[str, Trained],
    ) -> Trained:
        """Run a stage, or find what an earlier run of it left.

        Args:
            name: for people and folders.
            stage: the stage's config.
            seed: the pipeline's seed.
            inputs: artifacts by role.
        """
        key = _hash([stage.identity(), seed, {role: trained.key for role, trained in inputs.items()}])
        path = self.folder / f"{name}-{seed}-{key}"
        if not (path / "seconds").exists():
            began = time.monotonic()
            self._run(f"{name}-{seed}", stage, seed, key, inputs, path)
            (path / "seconds").write_text(f"{time.monotonic() - began:.1f}")
            self.made += 1
            self._say(f"{name}, seed {seed}: {time.monotonic() - began:.0f} s")
        return Trained(path, key, float((path / "seconds").read_text()))

    def each(self, work: Callable[..., T], *arguments: Iterable[object]) -> list[T]:
        """`work` for each tuple of arguments, all at once: the cores are shared, and none is idle at the end."""
        tuples = list(zip(*arguments, strict=True))
        with ThreadPoolExecutor(len(tuples), thread_name_prefix="lab") as pool:
            return list(pool.map(lambda tuple_: work(*tuple_), tuples))

    def each_seed(self, work: Callable[[int], T]) -> list[T]:
        """`work` for every seed."""
        return self.each(work, self.seeds)

    def _run(
        self, name: str, stage: Stage, seed: int, key: str, inputs: Mapping[str, Trained], path: Path
    ) -> None:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        work = path.with_name(f"{path.name}.work")
        work.mkdir(exist_ok=True)
        context = Context(
            name=name,
            pipeline="learning",
            seed=seed,
            key=key,
            inputs={role: _artifact(role, trained) for role, trained in inputs.items()},
            keys={},
            sources={},
            out=path,
            work=work,
            elastic=Elastic(workers=(1, 1), checkpoint_every_s=120.0),
            run=NullRun(),
        )
        stage.run(context)
        shutil.rmtree(work)


@contextmanager
def open_lab(folder: Path, seeds: Sequence[int], quick: bool, say: Callable[[str], None]) -> Iterator[Lab]:
    """A lab with a Ray cluster of its own."""
    with cluster.start(Cluster(), preload=_PRELOAD, prestart=len(seeds)):
        yield Lab(folder, seeds, quick, say)


def _artifact(role: str, trained: Trained) -> Artifact:
    manifest = Manifest(kind=role, key=trained.key, created="", files={}, provenance={}, summary={})
    return Artifact(trained.key, role, trained.path, manifest)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
