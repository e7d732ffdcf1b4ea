"""What no stage can see by itself: crops that a backbone from another stage cannot take, views too large for the
machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from orchestrator.elastic.cluster import most_object_store
from orchestrator.errors import KeyMistakeError, UserError
from orchestrator.pipeline import dag
from orchestrator.pipeline.load import LoadedPipeline
from orchestrator.stages.common.config import check_crops
from orchestrator.stages.distill.config import Distill
from orchestrator.stages.ssl.config import SelfSupervised


def check(loaded: LoadedPipeline, roles: Mapping[str, Mapping[str, str]]) -> None:
    """Raise the first of :func:`fit_errors`.

    Raises:
        UserError: as there.
    """
    for error in fit_errors(loaded, roles):
        raise error


def fit_errors(loaded: LoadedPipeline, roles: Mapping[str, Mapping[str, str]]) -> Iterator[UserError]:
    """Look at every stage that goes on from, or learns from, a backbone that the file describes: whether its patch
    divides the crops, and whether a distillation holds more views than this machine can.
    """
    yield from _windows(loaded)
    for name, stage in loaded.spec.stages.items():
        origin = dag.origin(roles, name)
        begun = loaded.spec.stages.get(origin or name)
        model = begun.model_recipe() if begun is not None else None
        if model is None:
            continue
        if isinstance(stage, SelfSupervised):
            every = [(("resolutions", at) if stage.resolutions else ("crops",), crops)
                     for at, (_, crops) in enumerate(stage.views())]  # fmt: skip
        elif isinstance(stage, Distill):
            every = [(("crops",), stage.crops)]
        else:
            continue
        for where, crops in every:
            try:
                check_crops(crops, model.model, model.model_overrides)
            except KeyMistakeError as error:
                what = error.what.removeprefix("crops.")
                yield UserError(
                    f"stage {name!r}: {what}, the backbone of {origin or name!r}",
                    where=loaded.where("stages", name, *where, error.key.split(".")[-1]),
                    hint=error.hint,
                )


def _windows(loaded: LoadedPipeline) -> Iterator[UserError]:
    """Only of an own cluster is known what it will have before it is there; the stage itself looks again."""
    if loaded.spec.cluster.address != "local" or loaded.spec.hardware is not None:
        return
    for name, stage in loaded.spec.stages.items():
        if isinstance(stage, Distill):
            window, step_bytes = (
                stage.window_of(stage.num_teachers),
                stage.view_bytes(stage.students.values()),
            )
            try:
                stage.check_room(
                    window, step_bytes, most_object_store(), loaded.where("stages", name, "window")
                )
            except UserError as error:
                yield error
