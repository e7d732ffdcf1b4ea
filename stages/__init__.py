"""The stage kinds. `AnyStage` is the one list of them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from orchestrator.stages.align_text import AlignText
from orchestrator.stages.curate import Curate
from orchestrator.stages.distill import Distill
from orchestrator.stages.evaluate import Evaluate
from orchestrator.stages.gram_anchor import GramAnchor
from orchestrator.stages.high_res import HighRes
from orchestrator.stages.pretrain import Pretrain
from orchestrator.stages.publish import Publish

AnyStage = Annotated[
    Curate | Pretrain | GramAnchor | HighRes | Distill | AlignText | Evaluate | Publish,
    Field(discriminator="kind"),
]
