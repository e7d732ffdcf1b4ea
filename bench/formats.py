"""A model in the format of timm, transformers, ONNX Runtime or torch.export gives our outputs at several sizes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from bench._torchvision import for_other_processes
from bench.harness import Claim, summarize
from bench.parity import randomise
from orchestrator.models import Backbone, ViTConfig, from_config, preset
from orchestrator.models.export import FORMATS, Preprocessing, misfit, missing, write
from orchestrator.models.export.check import LIMIT, Difference, compare

# Both families, with and without SwiGLU, registers and biases, and a stem that not all formats have.
MODELS = {
    "vit_s": preset("vit_s"),
    "vit_s, no registers": preset("vit_s", num_storage_tokens=0),
    "vit_s, patch 8": preset("vit_s", patch_size=8),
    "vit_s_plus": preset("vit_s_plus"),
    "vit_b": preset("vit_b"),
    "like vit_7b": ViTConfig(dim=512, depth=4, num_heads=4, ffn="swiglu", ffn_hidden=1024, qkv_bias=False),
    "vit_nano": preset("vit_nano"),
    "convnext_t": preset("convnext_t"),
    "convnext_mini": preset("convnext_mini"),
}
QUICK = ("vit_nano", "convnext_mini")
SIZE = 128


def run(quick: bool) -> Claim:
    """Each model in each format that can express it; quickly, two small ones."""
    arms, notes, worst = {}, [], 0.0
    chosen = QUICK if quick else tuple(MODELS)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PYTHONPATH"] = for_other_processes(Path(folder))
        for model in chosen:
            tower = from_config(MODELS[model]).eval().requires_grad_(False)
            randomise(tower)
            for name in FORMATS:
                why = misfit(tower.config, name)
                if why is not None or missing(name):
                    notes.append(f"{model}, {name}: {why or f'not installed: {missing(name)}'}")
                    continue
                found = differences(tower, name)
                arms[f"{model}, {name}"] = summarize([one.value for one in found])
                notes.append(f"{model}, {name}: {'; '.join(map(str, found))}")
                worst = max(worst, *(one.value for one in found))
    notes.append(f"random weights, every one perturbed; images × height × width; trained size {SIZE}")
    claim = "each library gives our outputs, loaded in a fresh process"
    return Claim(claim, worst, "largest absolute difference", LIMIT, None, arms, notes)


def differences(tower: Backbone, name: str) -> list[Difference]:
    """What `orchestrator pull --format` compares."""
    from orchestrator.models import MEAN, STD

    with tempfile.TemporaryDirectory() as folder:
        write(tower, name, Preprocessing(SIZE, MEAN, STD), Path(folder))
        return compare(tower, Path(folder), SIZE)
