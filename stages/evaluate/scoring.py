"""One model after another, or several at once on a Ray cluster: each by itself gives its rows, figures and pictures."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from orchestrator.errors import UserError
from orchestrator.evaluation.metric import Metric
from orchestrator.progress import ROUTINE, Meter
from orchestrator.stages.evaluate.candidates import Candidate
from orchestrator.stages.evaluate.measure import Measurements, Pool, features_of, floor, of_pixels, score
from orchestrator.stages.evaluate.results import Score, file_name
from orchestrator.stages.evaluate.shown import draw_maps
from orchestrator.stages.evaluate.towers import (
    Check,
    Crops,
    Tower,
    embed_crops,
    pixel_features,
    pixel_maps,
    remembering,
)
from orchestrator.storage.open import Needed, fetch

logger = logging.getLogger("orchestrator")

RAW_SIDE = 32
# The number of the baselines among the parts of an evaluation; models count from 1.
_BASELINES = 0


@dataclass(frozen=True)
class Work:
    """What is the same for all models of an evaluation.

    Attributes:
        name: of the stage.
        pool: the photos that take part.
        shown: rows of the index that PCA maps show.
        metrics: of the stage.
        k: neighbours.
        batch: images in one forward pass.
        seed: the pipeline's.
        kept_features: GiB, see :func:`remembering`.
        num_models: how many there are, for messages.
        needed: the artifacts that workers on other machines fetch first, see :attr:`Context.needed`.
    """

    name: str
    pool: Pool
    shown: Sequence[int]
    metrics: Sequence[Metric]
    k: int
    batch: int
    seed: int
    kept_features: float
    num_models: int
    needed: Sequence[Needed] = ()


@dataclass
class Scored:
    """What came of one model, or of all of them.

    Attributes:
        scores: rows of the k-NN table.
        measured: what metrics gave.
        maps: the PNG of PCA maps by the name of the row.
    """

    scores: list[Score] = field(default_factory=list)
    measured: Measurements = field(default_factory=Measurements)
    maps: dict[str, Path] = field(default_factory=dict)

    def add(self, other: Scored) -> None:
        """The rows of another model, after those that are there."""
        self.scores += other.scores
        self.maps |= other.maps
        for title, rows in other.measured.figures.items():
            self.measured.figures.setdefault(title, {}).update(rows)
        for title, drawn in other.measured.pictures.items():
            self.measured.pictures.setdefault(title, {}).update(drawn)


def score_all(
    work: Work, models: Sequence[Candidate], out: Path, check: Check, workers: int | None
) -> Scored:
    """The rows of all models in their order.

    Args:
        work: what they share.
        models: the candidates.
        out: the folder that pictures are written into.
        check: called now and then; may raise `Stopped`.
        workers: models at once on the Ray cluster; None for one after another in this process.
    """
    meter = Meter(work.name, len(models), "models scored")
    parts: dict[int, Scored] = {}
    if workers is None:
        photos = Photos.of(work, check)
        parts[_BASELINES] = baselines(work, next(iter(models), None), photos.crops, check)
        for number, model in enumerate(models, 1):
            meter.add(0, model.name)
            parts[number] = score_one(work, number, model, photos, out, check)
            meter.add(1, model.name)
    else:
        for number, scored in _on_ray(work, models, out, workers):
            check()
            parts[number] = scored
            if number != _BASELINES:
                meter.add(1, models[number - 1].name)
    found = parts.pop(_BASELINES)
    for number in sorted(parts):
        found.add(parts[number])
    figures = found.measured.figures
    found.measured.figures = {title: rows for title, rows in figures.items() if rows}
    return found


@dataclass(frozen=True)
class Photos:
    """The photos of the pool, and those that are shown: decoded once for all models of a process."""

    crops: Crops
    shown: Crops

    @classmethod
    def of(cls, work: Work, check: Check) -> Photos:
        """Those of an evaluation; none is read yet."""
        return cls(Crops(work.pool.index, work.pool.rows, check), Crops(work.pool.index, work.shown, check))


def baselines(work: Work, model: Candidate | None, crops: Crops, check: Check) -> Scored:
    """Rows of raw pixels and of answers that look at no picture; patches of pixels are of the size of `model`."""
    found, groups = Scored(), work.pool.groups
    # In the order of the stage.
    found.measured.figures = {metric.title: {} for metric in work.metrics}
    if not (groups or any(metric.of_pixels for metric in work.metrics)):
        return found
    raw_ND = pixel_features(crops.at(RAW_SIDE))
    pixels = of_pixels(raw_ND, work.pool, work.seed, check)
    if groups:
        found.scores = [floor(pixels), score(pixels, work.k, image_size=RAW_SIDE, dim=raw_ND.shape[1])]
    if crops.rows and model is not None and any(metric.of_pixels for metric in work.metrics):
        tower = model.load()
        seen = replace(
            pixels, size=tower.size, patch=tower.patch, maps=partial(pixel_maps, patch=tower.patch)
        )
        for metric in work.metrics:
            if metric.of_pixels:
                found.measured.baselines(metric, seen)
    return found


def score_one(work: Work, number: int, model: Candidate, photos: Photos, out: Path, check: Check) -> Scored:
    """The rows of one model; pictures are written into `out`."""
    found, crops = Scored(), photos.crops
    tower = remembering(model.load(), work.kept_features)
    what = f"{len(crops.rows):,} photos at {tower.size} px"
    if not crops.rows:
        what = "its maps, as no photo has a label"
    logger.info("%s: %s of %d, %s: %s", work.name, number, work.num_models, model.name, what, extra=ROUTINE)
    try:
        if model.picture:
            found.maps[model.name] = out / f"pca_{model.picture}.png"
            draw_maps(tower, photos.shown, work.pool.index, found.maps[model.name])
        if crops.rows:
            _measure(work, model, tower, crops, found, out, check)
    finally:
        if tower.memory is not None:
            tower.memory.flush()
    return found


def _measure(
    work: Work, model: Candidate, tower: Tower, crops: Crops, found: Scored, out: Path, check: Check
) -> None:
    cls_ND = embed_crops(tower, crops.batches(tower.size, work.batch), len(crops.rows), check)
    features = features_of(
        model.name, model.family, tower, crops, cls_ND, work.pool, work.batch, work.seed, check
    )
    for metric in work.metrics:
        found.measured.add(metric, features)
        if model.picture:
            path = out / f"metric_{file_name(metric.title)}_{model.picture}.png"
            found.measured.draw(metric, model.name, path)
    if work.pool.groups:
        known = {
            "model": tower.preset,
            "image_size": tower.size,
            "dim": cls_ND.shape[1],
            "num_parameters": tower.num_parameters,
            "student": model.student,
        }
        found.scores.append(score(features, work.k, **known))


# --- on a cluster -----------------------------------------------------------------------------------------------

_Answer = tuple[int, Scored | UserError, dict[str, bytes]]
# Of a model whose worker is lost, as with its machine. More often it is the model that ends workers.
_RETRIES = 3


def _on_ray(work: Work, models: Sequence[Candidate], out: Path, workers: int) -> Iterator[tuple[int, Scored]]:
    """Scored models as they become ready. A task is one model: so much is in a worker's memory at a time.

    The baselines are a task, too, so that no device waits for them; it has the number `_BASELINES`.
    """
    import ray

    from orchestrator.data.curation.block_workers import RayWorkers

    gpus = 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0
    pool = RayWorkers(workers, gpus=gpus, ahead=1, max_retries=_RETRIES)
    run: Callable[..., Iterator[_Answer]] = pool.run
    baseline: tuple[int, Candidate | None] = (_BASELINES, next(iter(models), None))
    pieces = [baseline, *enumerate(models, 1)]
    for number, scored, files in run(_task, pool.share(work), None, pieces):
        if isinstance(scored, UserError):
            raise scored
        for name, data in files.items():
            (out / name).write_bytes(data)
        moved = {title: _into(out, rows) for title, rows in scored.measured.pictures.items()}
        scored.measured.pictures = moved
        scored.maps = _into(out, scored.maps)
        yield number, scored


def _into(out: Path, rows: dict[str, Path]) -> dict[str, Path]:
    return {row: out / path.name for row, path in rows.items()}


def _go_on() -> None:
    """The driver stops a task, not the task itself."""


def _task(work: Work, _: None, piece: tuple[int, Candidate | None]) -> _Answer:
    """In a worker: a model's rows, and its pictures as bytes, since a worker may not see the driver's folder."""
    number, model = piece
    for one in work.needed:
        fetch(*one)
    with tempfile.TemporaryDirectory() as folder:
        try:
            photos = Photos.of(work, _go_on)
            scored: Scored | UserError
            if number == _BASELINES or model is None:
                scored = baselines(work, model, photos.crops, _go_on)
            else:
                scored = score_one(work, number, model, photos, Path(folder), _go_on)
        except UserError as error:
            scored = error
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    return number, scored, files
