"""Whether pictures that are read together are seen alike, and whether models see pictures of the bands they know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from orchestrator.config.pixels import PixelFormat
from orchestrator.data.sources.pixel_checks import unlike_pixels
from orchestrator.errors import UserError
from orchestrator.models.configs import RGB
from orchestrator.pipeline.load import LoadedPipeline
from orchestrator.stages.distill.config import Distill
from orchestrator.stages.evaluate.config import Evaluate

_INDEX, _TEACHER = "index", "teacher"


def pixel_errors(loaded: LoadedPipeline, roles: Mapping[str, Mapping[str, str]]) -> Iterator[UserError]:
    """Datasets whose pictures cannot be in one index, and stages that take a model to pictures of other bands.

    Metrics that read photos of their own are among these.

    Args:
        loaded: the pipeline.
        roles: by stage, which stage fills which of its inputs.
    """
    told = set()
    for stage in loaded.spec.stages.values():
        error = unlike_pixels(loaded.spec.data, stage.data_sources())
        if error is not None and error.what not in told:
            told.add(error.what)
            yield UserError(error.what, where=loaded.where(*(error.where or "").split(".")), hint=error.hint)
    if told:
        return
    for name, stage in loaded.spec.stages.items():
        if _INDEX not in roles[name]:
            continue
        pixels = _pixels(loaded, roles[name][_INDEX])
        if isinstance(stage, Evaluate):
            yield from _photos_of_metrics(loaded, name, stage, _channels(pixels))
        for role, need in roles[name].items():
            if role == _INDEX or _INDEX not in roles.get(need, {}):
                continue
            trained = _channels(_pixels(loaded, roles[need][_INDEX]))
            if isinstance(stage, Distill) and role == _TEACHER:
                try:
                    stage.seeing(pixels).own_channels(trained)
                except UserError as error:
                    where = loaded.where("stages", name, str(error.where))
                    yield UserError(error.what, where=where, hint=error.hint)
            elif trained != _channels(pixels):
                yield UserError(
                    f"stage {name!r} reads pictures of {_channels(pixels)} channels, and the model of stage {need!r} "
                    f"takes {trained}",
                    where=loaded.where("stages", name, "needs"),
                    hint="give both stages pictures of the same bands (`bands` of the data's `pixels`)",
                )


def _photos_of_metrics(
    loaded: LoadedPipeline, name: str, stage: Evaluate, channels: int
) -> Iterator[UserError]:
    """Metrics whose photos lack channels that the models of an evaluation take."""
    for at, metric in enumerate(stage.metrics):
        if metric.has_photos and channels != RGB:
            yield UserError(
                f"{metric.title} reads photos of {RGB} channels, and the models of stage {name!r} take {channels}",
                where=loaded.where("stages", name, "metrics", str(at)),
                hint="leave the metric out",
            )


def _pixels(loaded: LoadedPipeline, maker: str) -> PixelFormat | None:
    """How the pictures of a stage's index are seen."""
    for source in loaded.spec.stages[maker].data_sources():
        if source in loaded.spec.data:
            return loaded.spec.data[source].pixels
    return None


def _channels(pixels: PixelFormat | None) -> int:
    return (pixels or PixelFormat()).num_channels
