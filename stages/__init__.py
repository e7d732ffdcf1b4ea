"""The stage kinds. `AnyStage` is the one list of them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from orchestrator.stages.align_text.config import AlignText
from orchestrator.stages.curate.config import Curate
from orchestrator.stages.distill.config import Distill
from orchestrator.stages.evaluate.config import Evaluate
from orchestrator.stages.finetune.config import Finetune
from orchestrator.stages.publish.config import Publish
from orchestrator.stages.ssl.gram_anchor import GramAnchor
from orchestrator.stages.ssl.high_res import HighRes
from orchestrator.stages.ssl.pretrain import Pretrain

AnyStage = Annotated[
    Curate | Pretrain | GramAnchor | HighRes | Distill | AlignText | Finetune | Evaluate | Publish,
    Field(discriminator="kind"),
]
