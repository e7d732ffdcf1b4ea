"""The pipeline that storms are let loose on: curate, pretrain, and distill into one or two students."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BLOCKS = 5
_CROPS = {"global_size": 48, "local_size": 24, "num_local": 2, "blur_sigma": [0.1, 0.6]}
_HEADS = {"hidden": 64, "dino_prototypes": 256, "ibot_prototypes": 256, "prototype_std": 0.125}


def pipeline(photos: Path, steps: int, students: int) -> dict[str, Any]:
    """`steps` optimizer updates in each of the two training stages."""
    common: dict[str, Any] = {
        "steps": steps,
        "batch_size": 4 * BLOCKS,
        "block_size": 4,
        "crops": _CROPS,
        "optimizer": {"lr": {"peak": 1e-3, "warmup_steps": 6}},
        "ema": {"peak": 0.95},
    }
    names = ("first", "second")[:students]
    return {
        "name": "storm",
        "elastic": {
            "workers": [1, 3],
            "checkpoint_every_s": 2,
            "resize_share": 1.0,
            "exact": True,
            "heartbeat_timeout_s": 6,
            "stall_timeout_s": 120,
        },
        "data": {"photos": {"path": str(photos)}},
        "stages": {
            "curate": {"kind": "curate", "data": "photos", "clusters": 8, "sample": 0.3},
            "pretrain": {
                **common,
                "kind": "pretrain",
                # Sharded; the students' weights are whole in every worker.
                "zero_stage": 3,
                "needs": "curate",
                "model": "vit_femto",
                "drop_path": 0.2,
                "heads": _HEADS,
                "homogeneous": "photos",
            },
            "distill": {
                **common,
                "kind": "distill",
                "needs": ["curate", "pretrain"],
                "students": {name: {"model": "vit_femto"} for name in names},
            },
        },
    }


def jobs(spec: dict[str, Any]) -> list[str]:
    """Names of the elastic jobs, as runs and logs have them."""
    return ["pretrain", *(f"distill/{name}" for name in spec["stages"]["distill"]["students"])]
