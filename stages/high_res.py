"""`high_res`: a short refinement with crops of mixed and larger sizes."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from orchestrator.stages.base import Input
from orchestrator.stages.gram import RefinementGram
from orchestrator.stages.selfsup import BACKBONE_KINDS, INDEX_KINDS, Resolution, SelfSupervised


class HighRes(SelfSupervised):
    """High-resolution refinement (arXiv 2508.10104, section 5.1): one size triple a step, Gram anchoring on."""

    kind: Literal["high_res"]
    gram: RefinementGram = Field(RefinementGram(), description="Gram anchoring: to whom and how strongly.")
    resolutions: tuple[Resolution, ...] = Field(
        min_length=1, description="The size triples of mixed-resolution training; each step draws one."
    )

    inputs: ClassVar[tuple[Input, ...]] = (Input("index", INDEX_KINDS), Input("backbone", BACKBONE_KINDS))
