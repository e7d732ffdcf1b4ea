"""`high_res`: a short refinement with crops of mixed and larger sizes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from orchestrator.stages.ssl.config import Resolution
from orchestrator.stages.ssl.gram import RefinementGram
from orchestrator.stages.ssl.refinement import Refinement


class HighRes(Refinement):
    """High-resolution refinement (arXiv 2508.10104, section 5.1): mixed resolutions, with Gram anchoring."""

    kind: Literal["high_res"]
    gram: RefinementGram = Field(
        RefinementGram(), description="The settings of Gram anchoring: its teacher and its weight."
    )
    resolutions: tuple[Resolution, ...] = Field(
        min_length=1,
        description="The resolutions of mixed-resolution training. Each step samples one of them (DINOv3, section "
        "5.1).",
    )
