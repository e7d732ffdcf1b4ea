"""Small settings that tests of the training rules share, and the paper's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from orchestrator.stages.common.config import Heads, ModelRecipe

# Prototypes about of unit length, so that the teacher's temperature shows in its targets.
HEADS = Heads(
    hidden=16,
    dino_bottleneck=8,
    dino_prototypes=12,
    ibot_bottleneck=8,
    ibot_prototypes=12,
    prototype_std=0.35,
)
RECIPE = ModelRecipe(model="vit_femto", drop_path=0.0, heads=HEADS, global_size=32)
BASE: dict[str, Any] = {
    "steps": 100,
    "batch_size": 8,
    "block_size": 4,
    "crops": {"global_size": 32, "local_size": 16, "num_local": 2},
    "optimizer": {"lr": {"peak": 1e-3}},
}
# The stages of the 7B.
PAPER = yaml.safe_load((Path(__file__).parents[2] / "conf/paper/dinov3_7b.yaml").read_text())["stages"]
