"""Pictures of six bands through whole stages: curated, pretrained on, distilled to, evaluated, loaded and exported."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

import orchestrator
from orchestrator.config.pixels import PixelFormat
from orchestrator.data.decode import read_square
from orchestrator.errors import UserError
from orchestrator.models import build, load_pretrained, save_pretrained
from orchestrator.models.pixels import stats_of
from tests.band_files import band_scene, write_tiff

from .conftest import run_group

PIXELS = {"bands": [0, 1, 2, 3, 4, 5], "range": [0, 4095], "shown": [5, 3, 1]}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
TRAIN: dict[str, Any] = {
    "steps": 2, "batch_size": 4, "block_size": 2, "precision": "fp32", "needs": "x",
    "crops": {"global_size": 32, "local_size": 16, "num_local": 1},
    "optimizer": {"lr": {"peak": 1e-3}},
}  # fmt: skip
HEADS = {
    "hidden": 16,
    "dino_bottleneck": 8,
    "dino_prototypes": 16,
    "ibot_bottleneck": 8,
    "ibot_prototypes": 16,
}
PRETRAIN: dict[str, Any] = {**TRAIN, "kind": "pretrain", "heads": HEADS}


class Scenes(NamedTuple):
    """Files of six bands, the index of them, a backbone pretrained on them, and weights of three channels."""

    folder: Path
    index: Path
    pretrained: Path
    of_photos: Path


def scene(number: int) -> NDArray[np.uint16]:
    return band_scene(number, side=40)


@pytest.fixture(scope="module")
def scenes(forge: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    root = tmp_path_factory.mktemp("bands")
    (root / "scenes").mkdir()
    for number in range(8):
        write_tiff(root / "scenes" / f"{number}.tif", scene(number), deflate=True, predictor=True, rows=13)
    torch.manual_seed(1)
    save_pretrained(
        root / "photos",
        build("vit_femto").state_dict(),
        "vit_femto",
        {"image_size": 32},
        pixels={"mean": MEAN, "std": STD},
    )

    def run(name: str, config: dict[str, Any], inputs: dict[str, str]) -> Path:
        run_group(
            forge, root / f"{name}-lab", "stage", 1, folder=str(root / name), config=config, inputs=inputs,
            sources={"scenes": {"path": str(root / "scenes"), "pixels": PIXELS}},
        )  # fmt: skip
        return root / name / "out"

    index = run("curate", {"kind": "curate", "data": "scenes", "clusters": 2, "sample": 1.0}, {})
    pretrained = run("pretrain", {**PRETRAIN, "model": "vit_femto"}, {"index": str(index)})
    return Scenes(root / "scenes", index, pretrained, root / "photos")


def test_a_backbone_of_six_channels_comes_out_and_says_what_it_sees(scenes: Scenes) -> None:
    config = json.loads((scenes.pretrained / "model" / "config.json").read_text())

    values = np.stack([scene(number) for number in range(8)]).reshape(-1, 6) / 4095
    np.testing.assert_allclose(config["mean"], values.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(config["std"], values.std(axis=0), atol=1e-5)
    assert config["pixels"] == PIXELS
    assert config["config"]["num_channels"] == 6
    weights = load_file(scenes.pretrained / "model" / "model.safetensors")
    assert weights["patch_embed.weight"].shape == (48, 6, 8, 8)
    assert (scenes.index / "clusters.png").is_file()


def test_its_features_are_those_of_the_formula(scenes: Scenes) -> None:
    model = orchestrator.load(scenes.pretrained)
    path = scenes.folder / "3.tif"

    found = model.features(path)

    square = read_square(path, 32, pixels=PixelFormat.model_validate(PIXELS)).astype(np.float64) / 65535
    mean, std = (np.array(numbers) for numbers in stats_of(model.module))
    images = torch.from_numpy(((square - mean) / std).transpose(2, 0, 1)[None]).float()
    with torch.inference_mode():
        expected = load_pretrained(scenes.pretrained / "model")(images)
    assert np.abs(found.cls - expected.cls.numpy()).max() < 1e-4
    assert np.abs(found.patches - expected.patches.numpy()).max() < 1e-4
    # An array has the bands of a file.
    assert np.abs(model.features(scene(3)).cls - found.cls).max() < 1e-6
    with pytest.raises(UserError, match="it has 3 bands, and no band 5"):
        model.features(scene(3)[:, :, :3])


def test_a_backbone_starts_from_widened_weights_of_photos(
    scenes: Scenes, forge: subprocess.Popen[str], tmp_path: Path
) -> None:
    config = {**PRETRAIN, "from": str(scenes.of_photos), "freeze_backbone_steps": 2, "steps": 2}

    (found,) = run_group(
        forge, tmp_path / "lab", "stage", 1, folder=str(tmp_path / "stage"), config=config,
        inputs={"index": str(scenes.index)},
    )  # fmt: skip

    assert "error" not in found
    before = load_file(scenes.of_photos / "model.safetensors")["patch_embed.weight"]
    after = load_file(tmp_path / "stage" / "out" / "model" / "model.safetensors")["patch_embed.weight"]
    torch.testing.assert_close(after, before.repeat(1, 2, 1, 1) / 2)


def test_a_student_of_six_bands_learns_from_a_teacher_of_three(
    scenes: Scenes, forge: subprocess.Popen[str], tmp_path: Path
) -> None:
    teacher = {"from": str(scenes.of_photos), "bands": [2, 1, 0]}
    config = {
        **TRAIN, "kind": "distill", "features": {"teachers": {"photos": teacher}},
        "students": {"small": {"model": "convnext_mini"}},
    }  # fmt: skip

    (found,) = run_group(
        forge, tmp_path / "lab", "student", 1, folder=str(tmp_path / "stage"), config=config,
        inputs={"index": str(scenes.index)},
    )  # fmt: skip

    assert all(np.isfinite(record["metrics"]["loss"]) for record in found["history"])
    record = json.loads((Path(found["made"]) / "model" / "config.json").read_text())
    assert record["config"]["num_channels"] == 6
    assert len(record["mean"]) == 6
    assert record["pixels"] == PIXELS
    features = orchestrator.load(Path(found["made"]) / "model").features(scenes.folder / "0.tif")
    assert np.isfinite(features.cls).all()


def test_an_evaluation_shows_three_of_the_bands(
    scenes: Scenes, forge: subprocess.Popen[str], tmp_path: Path
) -> None:
    config = {"kind": "evaluate", "needs": "x", "num_pictures": 1, "metrics": []}

    (found,) = run_group(
        forge, tmp_path / "lab", "stage", 1, folder=str(tmp_path / "stage"), config=config,
        inputs={"index": str(scenes.index), "pretrain": str(scenes.pretrained)},
    )  # fmt: skip

    assert "error" not in found
    pictures = list((tmp_path / "stage" / "out").glob("pca_*.png"))
    assert pictures
    assert all(cv2.imread(str(path)).std() > 1 for path in pictures)
