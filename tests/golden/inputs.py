"""Fixed inputs of every stage kind: photographs and artifacts from integers and numpy's generator, made by no stage.

So a change in what one kind computes changes that kind's numbers and not those of the kinds that read its artifact.
"""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from orchestrator.config.schedules import Optimizer
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.models import build, load_pretrained, save_pretrained
from orchestrator.stages.common import lineage
from orchestrator.stages.common.config import Heads, ModelRecipe
from orchestrator.stages.common.nets import HeadedBackbone, zero3_leaf_modules
from orchestrator.training.checkpoint import reader
from orchestrator.training.checkpoint.storage import CheckpointStorage
from orchestrator.training.checkpoint.writer import CheckpointWriter
from orchestrator.training.engine import build_engine
from orchestrator.training.task import Modules

HEADS = {
    "hidden": 32, "dino_bottleneck": 16, "dino_prototypes": 64, "ibot_bottleneck": 16, "ibot_prototypes": 64,
    "prototype_std": 0.25,
}  # fmt: skip
RECIPE = ModelRecipe(model="vit_femto", drop_path=0.3, heads=Heads.model_validate(HEADS), global_size=32)
_COLOURS = ("red", "green", "blue")
_SIZE = (60, 80)  # rows, columns


def photographs(folder: Path, count: int = 24) -> Path:
    """PNGs of integer waves in three colours, each a label, and their captions."""
    folder.mkdir(parents=True)
    rows = [("file", "caption", "label")]
    for number in range(count):
        cv2.imwrite(str(folder / f"{number:02}.png"), picture(number))
        colour = _COLOURS[number % 3]
        rows.append((f"{number:02}.png", f"a {colour} thing, number {number}", colour))
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def picture(number: int) -> np.ndarray:
    """(60, 80, 3) uint8, in whole numbers so that no machine rounds it otherwise."""
    y, x = np.mgrid[0 : _SIZE[0], 0 : _SIZE[1]].astype(np.int64)
    layers = []
    for channel in range(3):
        slope = 2 + (number * 7 + channel * 3) % 5, 1 + (number * 5 + channel) % 4
        wave = np.abs((slope[0] * x + slope[1] * y + 31 * number + 17 * channel) % 256 - 128)
        layers.append(wave // 2 + (120 if channel == 2 - number % 3 else 20))
    return np.stack(layers, axis=-1).clip(0, 255).astype(np.uint8)


def index(folder: Path, photos: Path) -> Path:
    """An index of the photographs in two components."""
    folder.mkdir()
    with (photos / "captions.csv").open() as file:
        notes = list(csv.DictReader(file))
    ImageIndex(
        [
            ImageRecord(
                "photos", note["file"], str(photos), f"{number:064x}", _SIZE[1], _SIZE[0], caption=note["caption"],
                label=note["label"], component="balanced" if number % 2 == 0 else "pool",
            )
            for number, note in enumerate(notes)
        ]
    ).save(folder)  # fmt: skip
    return folder


def fill(module: nn.Module, seed: int) -> None:
    """Weights that follow from a seed alone: of the size that layers are made with, norms near 1."""
    rng = np.random.default_rng(seed)
    for parameter in module.parameters():
        noise = torch.from_numpy(rng.normal(size=tuple(parameter.shape)).astype(np.float32))
        scale = 0.1 if parameter.ndim < 2 else 1 / math.sqrt(parameter[0].numel())
        one = parameter.ndim == 1 and bool((parameter == 1).all())
        parameter.data = scale * noise + float(one)


def history(steps: int) -> str:
    """Records of a run, as an evaluation reads them."""
    metrics = [
        {"loss": 9.0 - step, "cls_patch_cosine": 0.1 * step, "patch_locality": 0.05 * step}
        for step in range(steps)
    ]
    return json.dumps([{"step": step + 1, "metrics": found} for step, found in enumerate(metrics)])


def backbone(folder: Path) -> Path:
    """What a backbone stage leaves: model, snapshots, lineage and a checkpoint with weights, EMA and moments.

    Called in a worker of a process group. The moments are even, so that an update is a smooth function of the
    gradient: with none, AdamW makes steps of full size of gradients that are nothing but rounding errors.
    """
    (folder / "snapshots").mkdir(parents=True)
    net, ema, older = (
        HeadedBackbone(RECIPE.model, drop, RECIPE.heads) for drop in (RECIPE.drop_path, 0.0, 0.0)
    )
    fill(net, 1)
    ema.load_state_dict(net.state_dict())
    fill(older, 2)
    for step, one in ((2, older), (4, ema)):
        save_file(dict(one.state_dict()), folder / "snapshots" / f"step-{step:08d}.safetensors")
    save_pretrained(
        folder / "model", ema.backbone.state_dict(), RECIPE.model, {"image_size": RECIPE.global_size}
    )
    (folder / "recipe.json").write_text(RECIPE.model_dump_json())
    (folder / "history.json").write_text(history(4))
    lineage.write(folder, json.loads(history(4)), None)
    _checkpoint(folder / "checkpoint", net, ema)
    return folder


def _checkpoint(folder: Path, net: nn.Module, ema: nn.Module) -> None:
    optimizer = Optimizer.model_validate({"lr": {"peak": 1e-3}})
    modules = Modules(net, ema=ema, zero3_leaf_modules=zero3_leaf_modules(RECIPE.model))
    engine = build_engine(modules, optimizer, zero_stage=3, precision="fp32", num_blocks=1)
    weights = {shard.name: shard.data.clone() for shard in engine.master()}
    moments = {
        "exp_avg": {name: torch.zeros_like(value) for name, value in weights.items()},
        "exp_avg_sq": {name: torch.full_like(value, 1e-4) for name, value in weights.items()},
    }
    engine.load(weights, moments, 100)
    work = folder.with_name("checkpointing")
    storage = CheckpointStorage(work)
    writer = CheckpointWriter(
        storage,
        token=reader.share(storage.acquire()),
        keep=1,
        keep_every=None,
        meta={"job": "golden", "seed": 0},
    )
    writer.begin(engine, 4)
    writer.wait()
    writer.commit()
    writer.finish()
    (work / "step-00000004").rename(folder)


def students(folder: Path) -> Path:
    """What `distill` leaves of one student, for those who read it."""
    net = build("vit_femto")
    fill(net, 3)
    own = folder / "students" / "small"
    save_pretrained(own / "model", net.state_dict(), "vit_femto", {"image_size": RECIPE.global_size})
    (own / "history.json").write_text(history(3))
    (folder / "sharing.json").write_text(json.dumps({"teacher_forwards_per_image": 1.0}))
    return folder


def text(folder: Path, tower: Path, captions: list[str], config: dict[str, Any]) -> Path:
    """What `align_text` leaves."""
    from orchestrator.stages.align_text.captions import train_tokenizer
    from orchestrator.stages.align_text.config import AlignText
    from orchestrator.stages.align_text.export import save_aligned
    from orchestrator.stages.align_text.task import align_net
    from orchestrator.stages.common.text_tokenizer import load_tokenizer

    folder.mkdir()
    stage = AlignText.model_validate(config)
    tokenizer = folder / "tokenizer.json"
    train_tokenizer(captions, stage.vocab_size, stage.context, tokenizer)
    net = align_net(stage, load_pretrained(tower).dim, load_tokenizer(tokenizer).get_vocab_size(), None)
    fill(net, 4)
    weights = {name: value.contiguous() for name, value in net.state_dict().items()}
    save_file(weights, folder / "export.safetensors")
    save_aligned(folder / "export.safetensors", folder / "aligned", stage, tower, tokenizer, image_size=32)
    (folder / "history.json").write_text(history(2))
    return folder


def evaluation(folder: Path) -> Path:
    """What `evaluate` leaves for `publish`."""
    folder.mkdir()
    rows = [{"student": "small", "accuracy": 0.75}]
    (folder / "table.json").write_text(json.dumps({"knn": {"k": 3, "num_photos": 24, "rows": rows}}))
    return folder
