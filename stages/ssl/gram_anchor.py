"""`gram_anchor`: more pretraining with patch similarities tied to those of an earlier checkpoint."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from orchestrator.stages.ssl.gram import Gram
from orchestrator.stages.ssl.refinement import Refinement


class GramAnchor(Refinement):
    """Gram anchoring (arXiv 2508.10104, section 4).

    The stage continues from a backbone's final checkpoint, with the optimizer's moments; or, with `from`, from trained
    weights with new heads.
    """

    kind: Literal["gram_anchor"]
    gram: Gram = Field(
        Gram(), description="The settings of Gram anchoring: its teacher, its weight and its start."
    )
    resolutions: tuple[()] = Field((), description="Gram anchoring has one size of crops.")
