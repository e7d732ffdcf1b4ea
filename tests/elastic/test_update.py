"""What one update does to each parameter, in a real job: rates by depth, decay on matrices, frozen prototypes.

AdamW's first update moves a parameter by its learning rate against the sign of its gradient, after decay has shrunk
it by rate times decay: both can be read off the weights and the first moment of the checkpoint after one step.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.models import ViTConfig, load_pretrained, preset
from orchestrator.stages.common.backbone import save_backbone
from orchestrator.stages.common.config import Heads
from orchestrator.stages.common.nets import HeadedBackbone

from .conftest import HEADS, RunJob
from .test_chunks import saved
from .test_steps import load_master

RATE, DECAY, LAYER_DECAY, PATCH_EMBED = 1e-2, 5.0, 0.8, 0.2
OPTIMIZER = {
    "lr": {"peak": RATE},
    "weight_decay": DECAY,
    "layer_decay": LAYER_DECAY,
    "patch_embed_scale": PATCH_EMBED,
}
# Blocks above each parameter, plus one, by hand; what is not named here learns at the full rate.
DEPTHS: dict[str, dict[str, int]] = {
    "vit_femto": {
        "backbone.patch_embed.": 3,
        "backbone.cls_token": 3,
        "backbone.storage_tokens": 3,
        "backbone.mask_token": 3,
        "backbone.blocks.0.": 2,
        "backbone.blocks.1.": 1,
    },
    "convnext_mini": {
        "backbone.downsamples.0.": 7,
        "backbone.mask_token": 7,
        "backbone.stages.0.0.": 6,
        "backbone.downsamples.1.": 5,
        "backbone.stages.1.0.": 5,
        "backbone.downsamples.2.": 4,
        "backbone.stages.2.0.": 4,
        "backbone.stages.2.1.": 3,
        "backbone.stages.2.2.": 2,
        "backbone.downsamples.3.": 1,
        "backbone.stages.3.0.": 1,
    },
}
EMBEDDINGS = ("backbone.patch_embed.", "backbone.downsamples.0.")
NEVER_DECAYED = (".bias", "_bias", ".gamma", ".norm.weight", "norm1.weight", "norm2.weight")


def initial(model: str) -> dict[str, torch.Tensor]:
    """The weights that every job of these tests starts with (seed 0)."""
    torch.manual_seed(0)
    net = HeadedBackbone(model, 0.3, Heads.model_validate(HEADS))
    return {name: value.detach() for name, value in net.named_parameters()}


def config(model: str, **more: Any) -> dict[str, Any]:
    return {
        "config": {"model": model, "optimizer": OPTIMIZER, "frozen_prototype_steps": 0, **more},
        "recipe": {"model": model, "drop_path": 0.3, "heads": HEADS, "global_size": 32},
    }


@pytest.mark.parametrize("model", ["vit_femto", "convnext_mini"])
def test_the_first_update_moves_every_parameter_by_its_own_rate(
    run_job: RunJob, tmp_path: Path, model: str
) -> None:
    run_job(tmp_path, 1, **config(model, steps=1))
    after = load_master(tmp_path / "checkpoints" / "step-00000001")
    start = initial(model)
    assert len(start) > 30
    for name, before in start.items():
        depth = next((depth for prefix, depth in DEPTHS[model].items() if name.startswith(prefix)), 0)
        rate = RATE * LAYER_DECAY**depth * (PATCH_EMBED if name.startswith(EMBEDDINGS) else 1.0)
        decay = 0.0 if name.endswith(NEVER_DECAYED) or is_map_norm(name) else DECAY
        kept = before.double().flatten().numpy() * (1 - rate * decay)
        gradient = after[f"exp_avg/{name}"].astype(float) / (1 - 0.9)
        moved = (kept - after[f"master/{name}"]) / rate
        # Adam's own 1e-8 shows where gradients are tiny.
        np.testing.assert_allclose(moved, gradient / (np.abs(gradient) + 1e-8), atol=1e-3, err_msg=name)
        assert np.abs(moved).max() > 0.9, name


def is_map_norm(name: str) -> bool:
    """The LayerNorm of a ConvNeXt's downsampling: after the stem's convolution, before the others'."""
    return name in (
        "backbone.downsamples.0.1.weight",
        *(f"backbone.downsamples.{i}.0.weight" for i in (1, 2, 3)),
    )


def test_prototypes_stay_for_exactly_so_many_steps_and_the_rest_moves_at_the_rate_of_the_step(
    run_job: RunJob, tmp_path: Path
) -> None:
    """Three frozen steps, with a weight decay that would show at once; a stop; and the fourth."""
    start = initial("vit_femto")
    prototypes = ("dino_head.prototypes.weight", "ibot_head.prototypes.weight")
    schedule = {"start": 4e-3, "peak": 1e-2, "end": 2e-3, "warmup_steps": 2, "shape": "linear"}
    rates = []
    for done, steps in ((3, 3), (4, 1)):
        settings = config("vit_femto", frozen_prototype_steps=3, optimizer=OPTIMIZER | {"lr": schedule})
        rates += [
            metrics["lr"] for _, metrics in run_job(tmp_path, 1, stop_after=steps, **settings)["metrics"]
        ]
        after = load_master(tmp_path / "checkpoints" / f"step-{done:08d}")
        for name, before in start.items():
            same = np.array_equal(after[f"master/{name}"], before.flatten().numpy())
            assert same == (name in prototypes and done == 3), (done, name)
    assert rates == pytest.approx([4e-3, 7e-3, 1e-2, 8e-3])


@pytest.mark.parametrize("exact", [False, True])
def test_weight_decay_follows_its_schedule_across_stops_and_workers(
    run_job: RunJob, tmp_path: Path, exact: bool
) -> None:
    """Four steps, each by another number of workers: the decay that each update applied is read off the weights."""
    decay = {"peak": 0.5, "end": 4.0, "shape": "cosine"}
    wanted = [4.0 - 3.5 * 0.5 * (1 + np.cos(np.pi * step / 4)) for step in range(4)]
    optimizer = {"lr": {"peak": RATE}, "weight_decay": decay, "layer_decay": 1.0, "patch_embed_scale": 1.0}
    settings = config("vit_femto", steps=4, optimizer=optimizer)
    before = {f"master/{name}": value.flatten().numpy() for name, value in initial("vit_femto").items()}
    for done, world in enumerate((1, 2, 3, 1), 1):
        (metrics,) = [
            metrics
            for _, metrics in run_job(tmp_path, world, stop_after=1, exact=exact, **settings)["metrics"]
        ]
        after = saved(tmp_path / "checkpoints" / f"step-{done:08d}")
        assert metrics["weight_decay"] == pytest.approx(wanted[done - 1])
        for name in ("backbone.blocks.0.attention.qkv.weight", "dino_head.prototypes.weight"):
            mean = after[f"exp_avg/{name}"].astype(float) / (1 - 0.9**done)
            square = after[f"exp_avg_sq/{name}"].astype(float) / (1 - 0.99**done)
            start = before[f"master/{name}"].astype(float)
            shrunk = (start - after[f"master/{name}"]) / RATE - mean / (np.sqrt(square) + 1e-8)
            # What is left of the update is decay · start; the best fit over all entries.
            assert shrunk @ start / (start @ start) == pytest.approx(wanted[done - 1], rel=1e-2), (done, name)
        bias = "backbone.blocks.0.ffn.up.bias"
        moved = after[f"exp_avg/{bias}"].astype(float) / (1 - 0.9**done)
        moved /= np.sqrt(after[f"exp_avg_sq/{bias}"].astype(float) / (1 - 0.99**done)) + 1e-8
        np.testing.assert_allclose(
            (before[f"master/{bias}"] - after[f"master/{bias}"]) / RATE, moved, atol=2e-3
        )
        before = after


def test_a_model_with_overrides_is_trained_and_exported_as_it_is_described(
    run_job: RunJob, tmp_path: Path
) -> None:
    """No storage tokens, no RoPE rescale, a key bias, another eps and another patch; two workers."""
    overrides = {
        "patch_size": 16,
        "num_storage_tokens": 0,
        "rope_rescale": None,
        "norm_eps": 1e-6,
        "key_bias": True,
    }
    settings = config("vit_femto", steps=2, model_overrides=overrides)
    settings["recipe"] |= {"model_overrides": overrides}
    result = run_job(tmp_path, 2, **settings)
    assert result["complete"]
    save_backbone(
        tmp_path / "exports" / "step-00000002.safetensors", "vit_femto", tmp_path / "model", 32, overrides
    )
    model = load_pretrained(tmp_path / "model")
    assert isinstance(model.config, ViTConfig)
    assert model.config == replace(preset("vit_femto"), **overrides)
    assert model.blocks[0].attention.qkv.k_bias.any(), "it learns"
    assert model.blocks[0].norm1.eps == model.norm.eps == 1e-6
    features = model(torch.zeros(1, 3, 32, 32))
    assert (features.storage.shape, features.patches.shape) == ((1, 0, 48), (1, 4, 48))
