"""A model keeps how it saw the values of files: `load` and `embed` see them so, too."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import torch
from sklearn.datasets import load_sample_image

import orchestrator
from orchestrator.config.pixels import PixelFormat
from orchestrator.data.decode import read_square
from orchestrator.models import build, load_pretrained, normalise, save_pretrained, stats_of
from orchestrator.stages.common.network_source import NetworkSource, as_recorded
from orchestrator.stages.common.open_network import as_seen
from orchestrator.stages.serving import _load_pyfunc

PIXELS = PixelFormat(bands=(0,), range=(0, 4095), mean=(0.2, 0.3, 0.4), std=(0.1, 0.2, 0.3))


def _published(folder: Path, pixels: PixelFormat | None) -> Path:
    torch.manual_seed(0)
    state = build("vit_femto").state_dict()
    told = pixels and pixels.model_dump(mode="json")
    save_pretrained(folder, state, "vit_femto", {"image_size": 32}, pixels=told)
    return folder


def _radiograph(path: Path) -> Path:
    grey = cv2.cvtColor(load_sample_image("flower.jpg"), cv2.COLOR_RGB2GRAY).astype(np.uint16)
    cv2.imwrite(str(path), 16 * grey)
    return path


def test_a_model_is_embedded_with_as_it_was_trained(tmp_path: Path) -> None:
    folder, photo = _published(tmp_path / "model", PIXELS), _radiograph(tmp_path / "a.png")
    model = orchestrator.load(folder)
    assert model.pixels == PixelFormat(bands=(0,), range=(0, 4095))
    vector = orchestrator.embed(model, photo)
    # The formula, in float64, of the square of the file.
    square = read_square(photo, 32, pixels=PIXELS).astype(np.float64) / 65535
    seen = (square - np.array(PIXELS.mean)) / np.array(PIXELS.std)
    with torch.inference_mode():
        cls = load_pretrained(folder)(torch.from_numpy(seen.transpose(2, 0, 1)[None]).float()).cls[0]
    assert np.abs(vector - torch.nn.functional.normalize(cls, dim=0).numpy()).max() < 1e-4
    # MLflow's way is the same.
    served = _load_pyfunc(str(folder)).predict({"image": [photo.read_bytes()]})
    assert np.abs(served[0] - vector).max() < 1e-4
    plain = orchestrator.embed(_published(tmp_path / "plain", None), photo)
    assert np.abs(plain - vector).max() > 0.01


def test_a_model_without_them_is_as_it_always_was(tmp_path: Path) -> None:
    folder = _published(tmp_path, None)
    record = json.loads((folder / "config.json").read_text())
    assert (record["mean"], record["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert "pixels" not in record
    assert orchestrator.load(folder).pixels is None
    assert stats_of(load_pretrained(folder)) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_sixteen_bits_are_normalised_as_eight_are() -> None:
    narrow = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    wide = (narrow.int() * 257).to(torch.uint16)
    assert torch.allclose(normalise(wide), normalise(narrow), atol=1e-6)


def test_a_teacher_from_a_folder_sees_as_the_folder_says(tmp_path: Path) -> None:
    source = NetworkSource.model_validate({"from": _published(tmp_path, PIXELS)})
    seen = as_recorded(source)
    assert (seen.mean, seen.std) == (PIXELS.mean, PIXELS.std)
    images = torch.full((1, 3, 4, 4), 65535, dtype=torch.int32).to(torch.uint16)
    expected = [(1 - mean) / std for mean, std in zip(PIXELS.mean or (), PIXELS.std or (), strict=True)]
    assert as_seen(images, seen, 4)[0, :, 0, 0].tolist() == [float(np.float32(one)) for one in expected]
    said = source.model_copy(update={"mean": (0.0, 0.0, 0.0)})
    told = NetworkSource.model_validate({"from": tmp_path, "mean": (0.0, 0.0, 0.0)})
    assert as_recorded(told).mean == said.mean
