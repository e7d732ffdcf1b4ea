"""Masks that a manifest names are those that finetune and evaluate use."""

from __future__ import annotations

import io
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError
from sklearn.datasets import load_sample_image

from orchestrator.config.dense import MaskData
from orchestrator.data.dense import DensePictures
from orchestrator.data.sources import manifest
from orchestrator.errors import UserError
from orchestrator.evaluation.metrics.segmentation import LinearSegmentation
from orchestrator.pipeline.load import load
from orchestrator.stages.finetune.dense import Segmentation


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Parts of a photograph in `images/` with masks in `masks/`, and the same pictures under other names."""
    photo = load_sample_image("flower.jpg")
    rng = np.random.default_rng(0)
    for part in ("images", "masks", "elsewhere/deep"):
        (tmp_path / part).mkdir(parents=True)
    lines = []
    for number in range(6):
        piece = Image.fromarray(photo[60 * number : 60 * number + 48, :64])
        mask = Image.fromarray(rng.integers(0, 3, (48, 64)).astype(np.uint8))
        piece.save(tmp_path / "images" / f"{number}.png")
        mask.save(tmp_path / "masks" / f"{number}.png")
        mask.save(tmp_path / "elsewhere" / "deep" / f"m{number}.png")
        line = {"path": f"images/{number}.png", "mask": f"elsewhere/deep/m{number}.png"}
        lines.append({**line, "weight": number} if number > 2 else line)
    lines.append({"path": "images/5.png", "caption": "a flower"})
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def test_a_manifest_gives_the_pairs_that_folders_give(folder: Path) -> None:
    plain = DensePictures(MaskData(path=folder))
    named = DensePictures(MaskData(path=folder, manifest=Path("m.jsonl")))
    named.check()
    assert len(named) == len(plain) == 6
    for row in range(6):
        for ours, theirs in zip(named.read(row), plain.read(row), strict=True):
            assert np.array_equal(ours, theirs)
    assert [named.index()[row].weight for row in range(6)] == [1, 1, 1, 3, 4, 5]
    assert plain.index().weights is None


def test_pictures_without_a_mask_take_no_part(folder: Path) -> None:
    rows = [{"path": "images/0.png"}, {"path": "images/1.png", "mask": "masks/1.png"}]
    (folder / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert len(DensePictures(MaskData(path=folder, manifest=folder / "m.jsonl"))) == 1


def test_masks_and_weights_are_part_of_the_key_of_finetune_and_evaluate(folder: Path) -> None:
    task = Segmentation.model_validate(
        {"type": "segmentation", "data": {"path": str(folder), "manifest": "m.jsonl"}}
    )
    found = task.files()
    masks = {folder / "elsewhere" / "deep" / f"m{number}.png" for number in range(6)}
    assert masks < set(found["data.path"])
    assert found["data.manifest"] == (folder / "m.jsonl",)
    metric = LinearSegmentation(use="linear_segmentation", data=task.data)
    metric.check()
    assert masks < set(metric.files()["data"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "path,mask\nimages/0.png,masks/9.png",
            "1 mask of the manifest cannot be found, such as masks/9.png",
        ),
        ("path,mask\nimages/9.png,masks/0.png", "1 picture of the manifest cannot be found"),
        ("path,caption\nimages/0.png,x", "the manifest gives no picture a mask"),
        ("path,mask\nimages/0.png,m.csv", "the mask m.csv is not a PNG"),
        (
            "path,mask\nimages/0.png,masks/0.png\nimages/0.png,masks/1.png",
            "the masks masks/0.png and masks/1.png",
        ),
    ],
)
def test_mistakes_are_one_message(folder: Path, text: str, said: str) -> None:
    (folder / "m.csv").write_text(text)
    with pytest.raises(UserError, match=said) as caught:
        DensePictures(MaskData(path=folder, manifest=Path("m.csv")))
    assert caught.value.hint


def test_masks_are_said_once(folder: Path) -> None:
    with pytest.raises(ValidationError, match="leave one of them out"):
        MaskData(path=folder, manifest=Path("m.jsonl"), layout="ade20k")
    with pytest.raises(UserError, match=r"the manifest x\.csv does not exist"):
        DensePictures(MaskData(path=folder, manifest=Path("x.csv")))


def _parquet(folder: Path, masks: list[Any], kind: pa.DataType) -> MaskData:
    pictures = [f"images/{number}.png" for number in range(len(masks))]
    pq.write_table(pa.table({"path": pictures, "mask": pa.array(masks, kind)}), folder / "m.parquet")
    return MaskData(path=folder, manifest=Path("m.parquet"))


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct"])
def test_a_parquet_manifest_may_hold_the_masks_themselves(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(folder / "cache"))
    masks: list[Any] = [(folder / "masks" / f"{number}.png").read_bytes() for number in range(5)]
    plain = DensePictures(MaskData(path=folder))
    wanted = [plain.read(row) for row in range(5)]
    column = {"binary": pa.binary(), "large_binary": pa.large_binary()}.get(kind)
    if column is None:
        # As Hugging Face's datasets have pictures.
        column = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        masks = [{"bytes": mask, "path": "x.png"} for mask in masks]
    data = _parquet(folder, [*masks, None], column)
    found = DensePictures(data)
    found.check()
    assert len(found) == 5, "the last picture has no mask"
    for row in range(5):
        for ours, theirs in zip(found.read(row), wanted[row], strict=True):
            assert np.array_equal(ours, theirs)
    written = {path: path.stat().st_mtime_ns for path in (folder / "cache/masks").iterdir()}
    assert len(written) == 5
    DensePictures(data)
    assert {path: path.stat().st_mtime_ns for path in (folder / "cache/masks").iterdir()} == written
    # What a curate stage reads of it is as before.
    assert len(manifest.read(folder / "m.parquet", folder).files) == 6


def test_a_manifest_with_masks_is_unpacked_once_unless_it_or_the_cache_changed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(folder / "cache"))
    masks = [(folder / "masks" / f"{number}.png").read_bytes() for number in range(5)]
    data, times, plain = _parquet(folder, masks, pa.binary()), [], manifest.mask_bytes

    def counted(path: Path) -> Any:
        times.append(path)
        return plain(path)

    monkeypatch.setattr(manifest, "mask_bytes", counted)
    before = DensePictures(data).target(0)
    for _ in range(3):
        DensePictures(data)
    assert len(times) == 1
    shutil.rmtree(folder / "cache")
    assert np.array_equal(DensePictures(data).target(0), before)
    assert len(times) == 2
    _parquet(folder, masks[::-1], pa.binary())
    assert not np.array_equal(DensePictures(data).target(0), before)


def test_where_masks_of_a_manifest_are_unpacked_is_no_part_of_a_key(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = [(folder / "masks" / f"{number}.png").read_bytes() for number in range(5)]
    found = []
    for cache, order in (("one", 1), ("other", 1), ("other", -1)):
        monkeypatch.setenv("ORCHESTRATOR_CACHE", str(folder / cache))
        data = _parquet(folder, masks[::order], pa.binary())
        task = Segmentation(type="segmentation", data=data).files()
        metric = LinearSegmentation(use="linear_segmentation", data=data).files()
        found.append((set(task), set(metric)))
    assert found[0] == found[1]
    assert found[0] != found[2], "other masks"


def test_a_mask_in_a_manifest_that_is_none_is_one_message(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(folder / "cache"))
    mask = (folder / "masks/0.png").read_bytes()
    data = _parquet(folder, [mask, b"GIF89a"], pa.binary())
    with pytest.raises(UserError, match="the mask in row 2 of the manifest is not a PNG") as caught:
        DensePictures(data)
    assert caught.value.where == f"{folder / 'm.parquet'}:2"
    other = (folder / "masks/1.png").read_bytes()
    table = pa.table({"path": ["images/0.png"] * 3, "mask": pa.array([mask, mask, other])})
    pq.write_table(table, folder / "m.parquet")
    with pytest.raises(UserError, match=r"gives images/0\.png two masks"):
        DensePictures(data)


def test_a_mistake_in_a_mask_names_the_manifest_that_holds_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(folder / "cache"))
    good, small = ((folder / "masks" / f"{number}.png").read_bytes() for number in (0, 1))
    small_file = io.BytesIO()
    Image.open(io.BytesIO(small)).resize((10, 9)).save(small_file, "PNG")
    for mask, said in (
        (small_file.getvalue(), r"the mask of images/1\.png in the manifest: it has 10x9 pixels"),
        (small[:30], r"the mask of images/1\.png in the manifest: a file of the data set cannot be read"),
    ):
        pictures = DensePictures(_parquet(folder, [good, mask], pa.binary()))
        for look in (pictures.check, partial(pictures.read, 1)):
            with pytest.raises(UserError, match=said) as caught:
                look()
            assert caught.value.where == str(folder / "m.parquet")
            assert "cache" not in str(caught.value)
            assert "copy it" not in str(caught.value)


@pytest.mark.parametrize("manifest", ["m.csv", "gone.csv"])
def test_what_is_wrong_with_a_manifest_is_said_and_not_that_images_are_missing(
    folder: Path, manifest: str
) -> None:
    data = folder / "elsewhere"
    (data / "m.csv").write_text("path,mask\n../images/0.png,deep/m0.png")
    (folder / "p.yaml").write_text(
        f"""
name: x
data: {{photos: {{path: {folder / "images"}}}}}
stages:
  curate: {{kind: curate, data: photos}}
  pretrain:
    {{kind: pretrain, needs: curate, model: vit_femto, steps: 2, batch_size: 16, optimizer: {{lr: {{peak: 0.1}}}}}}
  tune:
    kind: finetune
    needs: pretrain
    task: {{type: segmentation, data: {{path: {data}, manifest: {data / manifest}}}}}
    mode: lora
    steps: 2
    batch_size: 16
    optimizer: {{lr: {{peak: 0.1}}}}
"""
    )
    with pytest.raises(UserError) as caught:
        load(folder / "p.yaml", [])
    said = str(caught.value)
    if manifest == "m.csv":
        assert "names '../images/0.png', which is not a file in" in said
        assert f"at   {data / 'm.csv'}:2\n" in said
    else:
        assert "no such file" in said
        assert "stages.tune.task.data.manifest" in said
    assert "elsewhere/images" not in said
