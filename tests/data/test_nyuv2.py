"""NYUv2's one file: what is unpacked of it, once, and what is said where it cannot be."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from orchestrator.config.dense import DepthData
from orchestrator.data import nyuv2
from orchestrator.data.dense import DensePictures
from orchestrator.errors import UserError
from orchestrator.evaluation.metrics.depth import LinearDepth

COUNT, WIDTH, HEIGHT = 40, 20, 12


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def written(folder: Path, **changes: Any) -> tuple[DepthData, np.ndarray, np.ndarray]:
    """A file as MATLAB writes it, by columns, and what it holds by rows."""
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (COUNT, HEIGHT, WIDTH, 3), dtype=np.uint8)
    depths = rng.uniform(0.7, 9.9, (COUNT, HEIGHT, WIDTH)).astype(np.float32)
    depths[:, 0, 0] = 0
    path = folder / "nyu_depth_v2_labeled.mat"
    parts = {"images": images.transpose(0, 3, 2, 1), "depths": depths.transpose(0, 2, 1), **changes}
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, part in parts.items():
            if part is not None:
                file.create_dataset(name, data=part, chunks=True, compression="gzip")
    return DepthData(path=path, layout="nyuv2"), images, depths


def test_pictures_and_metres_are_those_of_the_file(tmp_path: Path) -> None:
    data, images, depths = written(tmp_path)
    pictures = DensePictures(data)
    assert len(pictures) == COUNT
    pictures.check()
    for row in range(COUNT):
        pixels, depth = pictures.read(row)
        np.testing.assert_array_equal(pixels, images[row])
        np.testing.assert_allclose(depth, depths[row], atol=1.01e-4)
        assert depth[0, 0] == 0
    splits = pictures.splits("data")
    assert sum(len(splits[name]) for name in ("train", "validation", "test")) == COUNT
    metric = LinearDepth(use="linear_depth", data=data)
    metric.check()
    assert metric.files()["data"] == (data.path,)


def test_the_official_split_is_taken(tmp_path: Path) -> None:
    data, images, _ = written(tmp_path)
    test = [2, 5, 9]
    train = [number for number in range(1, COUNT + 1) if number not in test]
    savemat(tmp_path / "splits.mat", {"trainNdxs": np.array([train]).T, "testNdxs": np.array([test]).T})
    pictures = DensePictures(data)
    found = [pictures.read(int(row))[0] for row in pictures.splits("data").test]
    assert sorted(one.tobytes() for one in found) == sorted(images[number - 1].tobytes() for number in test)
    assert len(LinearDepth(use="linear_depth", data=data).files()["data"]) == 2
    (tmp_path / "splits.mat").write_bytes(b"none")
    with pytest.raises(UserError, match="the official split cannot be read"):
        DensePictures(data)


def test_it_is_unpacked_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = written(tmp_path)[0]
    DensePictures(data)
    monkeypatch.setattr(nyuv2, "_unpack", None)
    assert len(DensePictures(data)) == COUNT
    assert len(list((cache / "nyuv2").iterdir())) == 1


def test_two_processes_may_unpack_it_at_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = written(tmp_path)[0]
    alone = nyuv2._unpack

    def slower(*arguments: Any) -> None:
        monkeypatch.setattr(nyuv2, "_unpack", alone)
        nyuv2.unpacked(data)
        alone(*arguments)

    monkeypatch.setattr(nyuv2, "_unpack", slower)
    assert len(DensePictures(data)) == COUNT
    assert len(list((cache / "nyuv2").iterdir())) == 1


def test_mistakes_are_named(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="there is no file"):
        DensePictures(DepthData(path=tmp_path / "none.mat", layout="nyuv2"))
    with pytest.raises(UserError, match=r"the file has no 'depths'; it has images, other"):
        DensePictures(written(tmp_path, depths=None, other=np.zeros((2, 2)))[0])
    with pytest.raises(UserError, match=r"`images` is \(40, 3, 20, 12\) and `depths` \(40, 3, 20\)"):
        DensePictures(written(tmp_path, depths=np.zeros((COUNT, 3, WIDTH)))[0])
    (tmp_path / "nyu_depth_v2_labeled.mat").write_bytes(b"no HDF5")
    with pytest.raises(UserError, match="the file cannot be read"):
        DensePictures(DepthData(path=tmp_path / "nyu_depth_v2_labeled.mat", layout="nyuv2"))
    assert list((cache / "nyuv2").iterdir()) == [], "nothing is left of what went wrong"


def test_without_h5py_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "nyu.mat").write_bytes(b"")
    with pytest.raises(UserError, match="h5py is not installed") as caught:
        DensePictures(DepthData(path=tmp_path / "nyu.mat", layout="nyuv2"))
    assert caught.value.hint == 'install it: pip install "dinov3-orchestrator[nyuv2]"'
