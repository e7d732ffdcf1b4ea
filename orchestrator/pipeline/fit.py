"""What only two stages together can show to be wrong: crops that a backbone from another stage cannot take."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.errors import UserError
from orchestrator.pipeline import graph
from orchestrator.pipeline.load import LoadedPipeline
from orchestrator.stages.distill import Distill
from orchestrator.stages.pretrain import Pretrain
from orchestrator.stages.selfsup import SelfSupervised, check_crops


def check(loaded: LoadedPipeline, roles: Mapping[str, Mapping[str, str]]) -> None:
    """Look at every stage that goes on from, or learns from, a backbone that the file describes.

    Raises:
        UserError: its patch does not divide a crop.
    """
    for name, stage in loaded.spec.stages.items():
        origin = graph.origin(roles, name)
        model = loaded.spec.stages.get(origin or name)
        if not isinstance(model, Pretrain):
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
                check_crops(crops, model.model)
            except ValueError as error:
                what = str(error).removeprefix("crops.")
                raise UserError(
                    f"stage {name!r}: {what.split('; use ')[0]}, the backbone of {origin or name!r}",
                    where=loaded.where("stages", name, *where),
                    hint=f"use {what.split('; use ')[1]}",
                ) from None
