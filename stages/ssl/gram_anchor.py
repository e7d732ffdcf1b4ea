"""`gram_anchor`: more pretraining with patch similarities tied to those of an earlier checkpoint."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from orchestrator.stages.base import Input
from orchestrator.stages.common.config import BACKBONE_KINDS, INDEX_KINDS
from orchestrator.stages.ssl.config import SelfSupervised
from orchestrator.stages.ssl.gram import Gram


class GramAnchor(SelfSupervised):
    """Gram anchoring (arXiv 2508.10104, section 4).

    The stage continues from a backbone's final checkpoint, with the optimizer's moments.
    """

    kind: Literal["gram_anchor"]
    gram: Gram = Field(
        Gram(), description="The settings of Gram anchoring: its teacher, its weight and its start."
    )
    resolutions: tuple[()] = Field((), description="Gram anchoring has one size of crops.")

    inputs: ClassVar[tuple[Input, ...]] = (Input("index", INDEX_KINDS), Input("backbone", BACKBONE_KINDS))
