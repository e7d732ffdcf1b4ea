"""Datasets in a bucket are those of the same folder, on a real S3 server; what is not needed is not fetched."""

from __future__ import annotations

import hashlib
import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from s3_server import S3Server
from sklearn.datasets import load_sample_image

from orchestrator.config.schema import DataSource
from orchestrator.data.blocks import CropBlocks
from orchestrator.data.decode import UnreadableImage, read_header, read_rgb
from orchestrator.data.image_cache import ImageCache
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.data.resized_images import ResizedImages
from orchestrator.data.sampler import SampleOrder
from orchestrator.data.sources import remote
from orchestrator.data.sources.folder import fingerprint, list_images
from orchestrator.data.sources.scan import scan
from orchestrator.data.sources.source_captions import captions_of
from orchestrator.data.views import CropConfig
from orchestrator.errors import UserError
from orchestrator.storage.s3_client import StoreError

PHOTO = load_sample_image("china.jpg")


def _jpeg(number: int, quality: int = 90) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PHOTO[10 * number : 10 * number + 200, :300]).save(file, "JPEG", quality=quality)
    return file.getvalue()


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every answer to a request for a part of an object."""
    sizes: list[int] = []
    plain = remote._RangeFile._fetch

    def count(self: remote._RangeFile, at: int, size: int) -> tuple[bytes, int]:
        found = plain(self, at, size)
        sizes.append(len(found[0]))
        return found

    monkeypatch.setattr(remote._RangeFile, "_fetch", count)
    return sizes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    (root / "sub").mkdir(parents=True)
    for number in range(4):
        (root / ("sub" if number % 2 else ".") / f"{number}.jpg").write_bytes(_jpeg(number))
    (root / "notes.txt").write_text("beside")
    (root / "scan.dcm").write_bytes(b"DICM")
    (root / ".hidden.jpg").write_bytes(b"")
    (root / "broken.jpg").write_bytes(_jpeg(0)[:500])
    (root / "empty.png").write_bytes(b"")
    return root


def _upload(server: S3Server, folder: Path, s3_uri: str) -> DataSource:
    prefix = s3_uri.removeprefix("s3://tests/")
    for path in folder.rglob("*"):
        if path.is_file():
            server.client().put_object(
                Bucket="tests", Key=f"{prefix}/{path.relative_to(folder).as_posix()}", Body=path.read_bytes()
            )
    return DataSource.model_validate({"path": s3_uri})


def test_a_bucket_holds_what_the_folder_holds(s3: S3Server, s3_uri: str, folder: Path) -> None:
    local, source = DataSource(path=folder), _upload(s3, folder, s3_uri)
    assert source.is_remote
    here, there = list_images(local, "x"), list_images(source, "x")
    assert there.files == here.files
    assert sorted((item.path, item.reason, item.kind) for item in there.left_out) == sorted(
        (item.path, item.reason, item.kind) for item in here.left_out
    )
    assert scan(source, "x", there) == scan(local, "x", here)
    assert np.array_equal(read_rgb(source.root / "0.jpg"), read_rgb(folder / "0.jpg"))
    assert read_header(source.root / "sub" / "1.jpg") == read_header(folder / "sub" / "1.jpg")
    with pytest.raises(UnreadableImage):
        read_rgb(source.root / "gone.jpg")
    # What a resolved pipeline file says is read again.
    assert DataSource.model_validate(source.model_dump(mode="json")) == source


def test_the_key_is_of_etags_and_no_object_is_read_for_it(
    s3: S3Server, s3_uri: str, folder: Path, fetched: list[int]
) -> None:
    source = _upload(s3, folder, s3_uri)
    first = fingerprint(source)
    assert fingerprint(source) == first
    assert fetched == []
    (folder / "0.jpg").write_bytes(_jpeg(9))
    _upload(s3, folder, s3_uri)
    assert fingerprint(source) != first


def test_shards_in_a_bucket_are_read_by_ranges(
    s3: S3Server, s3_uri: str, tmp_path: Path, fetched: list[int]
) -> None:
    root = tmp_path / "tars"
    root.mkdir()
    datas = [_jpeg(number, 98) for number in range(12)]
    with tarfile.open(root / "a.tar", "w") as tar:
        for number, data in enumerate(datas):
            for name, content in ((f"{number:03}.jpg", data), (f"{number:03}.txt", b"photo %d" % number)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            # What a shard may hold besides: nobody asks for it.
            bulk = tarfile.TarInfo(f"{number:03}.npy")
            bulk.size = 1 << 20
            tar.addfile(bulk, io.BytesIO(bytes(1 << 20)))
    source = _upload(s3, root, s3_uri).model_copy(update={"shards": "tar"})
    listing = list_images(source, "x")
    assert listing.files == list_images(DataSource(path=root, shards="tar"), "x").files
    assert sum(fetched) < 0.7 * (root / "a.tar").stat().st_size
    assert captions_of(source, "x", listing.files).notes[listing.files[0]][0] is not None
    fetched.clear()
    by_name = {file.rpartition("::")[2]: file for file in listing.files}
    photos = {photo.path: photo for photo in scan(source, "x", listing)}
    for number, data in enumerate(datas):
        assert photos[by_name[f"{number:03}.jpg"]].bytes == len(data)
    # One request a picture, of exactly its bytes.
    assert sorted(fetched) == sorted(map(len, datas))


def test_training_reads_from_a_bucket(s3: S3Server, s3_uri: str, folder: Path) -> None:
    source = _upload(s3, folder, s3_uri)

    def blocks(root: Path) -> CropBlocks:
        rows = [ImageRecord("x", name, str(root), "0" * 64, 300, 200) for name in ("0.jpg", "sub/1.jpg")]
        order = SampleOrder({"all": np.arange(2)}, batch_size=2, seed=0)
        config = CropConfig(global_size=32, local_size=16, num_local=2)
        return CropBlocks(
            ImageIndex(rows),
            order,
            lambda step: config,
            patch_size=16,
            block_size=2,
            seed=0,
            max_unreadable=0,
        )

    here, there = (blocks(root).load(3, 0).arrays for root in (folder, source.root))
    assert all(np.array_equal(here[name], there[name]) for name in here)


def test_what_is_in_the_cache_is_not_fetched_again(
    s3: S3Server,
    s3_uri: str,
    folder: Path,
    tmp_path: Path,
    fetched: list[int],
) -> None:
    """A photo above the size that is kept is kept resized, and a smaller one as the file that it is."""
    source = _upload(s3, folder, s3_uri)
    digest = hashlib.sha256(_jpeg(0)).hexdigest()
    record = ImageRecord("x", "0.jpg", str(source.root), digest, 300, 200)

    def read(root: Path, side: int) -> NDArray[Any]:
        kept = ImageCache(tmp_path / "images", 1 << 30)
        found = ResizedImages(side, kept).use(record, root / "0.jpg", lambda image: image, None, None)
        kept.flush()
        return found

    for side in (100, 200):
        here = read(folder, side)
        shutil.rmtree(tmp_path / "images", ignore_errors=True)
        cold = read(source.root, side)
        assert fetched
        fetched.clear()
        assert np.array_equal(read(source.root, side), cold)
        assert not fetched
        assert np.array_equal(here, cold)


def test_a_server_that_does_not_answer_costs_no_picture(
    s3: S3Server, s3_uri: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _upload(s3, folder, s3_uri)

    def away(self: object, at: int, count: int) -> object:
        raise StoreError("the store could not give it: connection refused")

    monkeypatch.setattr(remote._RangeFile, "_fetch", away)
    with pytest.raises(StoreError):
        read_rgb(source.root / "0.jpg")


def test_a_manifest_names_objects(s3: S3Server, s3_uri: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"path": "0.jpg", "label": "a"}\n{"path": "none.jpg"}\n')
    source = _upload(s3, folder, s3_uri).model_copy(update={"manifest": tmp_path / "m.jsonl"})
    listing = list_images(source, "x")
    assert listing.files == ("0.jpg",)
    assert [(item.path, item.reason) for item in listing.left_out] == [("none.jpg", "does not exist")]


def test_wrong_addresses_are_one_message(s3: S3Server, s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no images"):
        list_images(DataSource.model_validate({"path": f"{s3_uri}/none"}), "x")
    with pytest.raises(UserError, match="'nobodys-bucket' does not exist"):
        list_images(DataSource.model_validate({"path": "s3://nobodys-bucket/x"}), "x")
