from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orchestrator.models import build, embed, load_pretrained, normalise, preprocess, save_pretrained


def photo(height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("vit_femto", {}), ("vit_femto", {"drop_path": 0.1, "num_storage_tokens": 0}), ("convnext_mini", {})],
)
def test_round_trip(tmp_path: Path, name: str, overrides: dict[str, object]) -> None:
    model = build(name, **overrides).eval()
    save_pretrained(tmp_path / "m", model.state_dict(), name, {"step": 7}, overrides)
    loaded = load_pretrained(tmp_path / "m")
    assert not loaded.training
    assert loaded.config == model.config
    images = torch.randn(1, 3, 32, 48)
    assert torch.equal(loaded(images).patches, model(images).patches)
    record = json.loads((tmp_path / "m" / "config.json").read_text())
    assert record["extra"] == {"step": 7}
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]


def test_stored_dtype_is_kept(tmp_path: Path) -> None:
    save_pretrained(tmp_path, build("vit_femto").to(torch.bfloat16).state_dict(), "vit_femto")
    assert next(load_pretrained(tmp_path).parameters()).dtype == torch.bfloat16


def test_state_of_another_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weights do not fit the model: .*blocks"):
        save_pretrained(tmp_path / "m", build("vit_femto").state_dict(), "vit_pico")
    assert not (tmp_path / "m").exists()


def test_unfinished_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_pretrained(tmp_path)
    save_pretrained(tmp_path, build("vit_femto").state_dict(), "vit_femto")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_pretrained(tmp_path)


def test_newer_format_is_refused(tmp_path: Path) -> None:
    save_pretrained(tmp_path, build("vit_femto").state_dict(), "vit_femto")
    record = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(record | {"format": 2}))
    with pytest.raises(ValueError, match="format 2"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [{"mean": [0]}, {"mean": 5}, {"mean": "abc"}, {"mean": ["a", "b", "c"]}, {"mean": [float("nan")] * 3},
     {"std": [0, 0, 0]}, {"std": [0.2, 0.2, -1]}, {"std": [True, 1, 1]}, {"std": {"a": 1}}],
)  # fmt: skip
def test_pixels_cannot_be_normalised_with_what_is_no_number(wrong: dict[str, object], tmp_path: Path) -> None:
    """Vectors would be of other pixels, or no numbers, and nobody would be told."""
    save_pretrained(tmp_path, build("vit_femto").state_dict(), "vit_femto")
    record = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(record | wrong))
    with pytest.raises(ValueError, match=next(iter(wrong))):
        load_pretrained(tmp_path)


def test_normalise_uses_imagenet_statistics() -> None:
    image = torch.tensor([124, 116, 104], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(124 / 255 - 0.485) / 0.229, (116 / 255 - 0.456) / 0.224, (104 / 255 - 0.406) / 0.225]
    torch.testing.assert_close(normalise(image).flatten(), torch.tensor(expected))


def test_preprocess_takes_the_centre_of_the_shorter_side() -> None:
    image = np.zeros((20, 60, 3), np.uint8)
    image[:, 20:40] = 255
    assert torch.equal(preprocess(image, 20), normalise(torch.full((1, 3, 20, 20), 255, dtype=torch.uint8)))


def test_preprocess_turns_and_flattens_photos(tmp_path: Path) -> None:
    array = photo(32, 32)
    upright = preprocess(array, 32)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned a quarter left: to be turned right for display
    Image.fromarray(np.rot90(array)).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        assert torch.equal(preprocess(turned, 32), upright)
    clear = Image.fromarray(np.dstack([array, np.zeros((32, 32), np.uint8)]))
    assert torch.equal(preprocess(clear, 32), normalise(torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)))
    with pytest.raises(ValueError, match="8 bits"):
        preprocess(Image.new("I;16", (32, 32)), 32)
    with pytest.raises(ValueError, match=r"expected uint8 \(H, W, 3\)"):
        preprocess(array.astype(np.float32), 32)


def test_embed_is_a_unit_vector_and_the_same_for_both_image_types() -> None:
    model = build("vit_femto").eval()
    vector = embed(model, photo(), 32)
    assert vector.shape == (48,)
    assert vector.norm().item() == pytest.approx(1, abs=1e-6)
    assert not vector.requires_grad
    assert torch.equal(vector, embed(model, Image.fromarray(photo()), 32))
    with pytest.raises(ValueError, match="not a multiple of the patch"):
        embed(model, photo(), 30)
