"""`gram_anchor`: more pretraining with patch similarities tied to those of an earlier checkpoint."""

from __future__ import annotations

from typing import ClassVar, Literal

from orchestrator.stages.base import Input
from orchestrator.stages.gram import Gram
from orchestrator.stages.selfsup import BACKBONE_KINDS, INDEX_KINDS, SelfSupervised


class GramAnchor(SelfSupervised):
    """Gram anchoring (arXiv 2508.10104, section 4): goes on from a backbone's final checkpoint, moments included."""

    kind: Literal["gram_anchor"]
    gram: Gram = Gram()
    resolutions: tuple[()] = ()

    inputs: ClassVar[tuple[Input, ...]] = (Input("index", INDEX_KINDS), Input("backbone", BACKBONE_KINDS))
