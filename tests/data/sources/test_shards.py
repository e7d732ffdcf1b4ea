"""Pictures in tar files are those that the tar program and tarfile find, and are read in place."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError
from sklearn.datasets import load_sample_image

from orchestrator.config.schema import DataSource
from orchestrator.data.decode import UnreadableImage, read_header, read_rgb
from orchestrator.data.sources import account as accounts
from orchestrator.data.sources import shards
from orchestrator.data.sources.folder import fingerprint, list_images
from orchestrator.data.sources.scan import scan
from orchestrator.data.sources.shard_members import member_path, open_member, shard_of
from orchestrator.data.sources.source_captions import captions_of
from orchestrator.errors import UserError

PHOTO = load_sample_image("flower.jpg")


def _jpeg(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PHOTO[10 * number : 10 * number + 80, :100]).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards by the tar program, of files as WebDataset has them; one file that is not a tar."""
    loose, root = tmp_path / "loose", tmp_path / "tars"
    loose.mkdir()
    (root / "part").mkdir(parents=True)
    for number in range(6):
        (loose / f"{number:04}.jpg").write_bytes(_jpeg(number))
        (loose / f"{number:04}.txt").write_text(f"caption {number}\n")
        (loose / f"{number:04}.cls").write_text(str(number % 2))
    (loose / "0005.txt").unlink()
    (loose / "0005.json").write_text(json.dumps({"caption": "of json", "label": 9}))
    (loose / "0004.seg.png").write_bytes(b"")
    (loose / "notes.pdf").write_bytes(b"")
    for shard, half in (("a.tar", range(3)), ("part/b.tar", range(3, 6))):
        names = [path.name for path in sorted(loose.iterdir()) if path.name[:4] in {f"{n:04}" for n in half}]
        names += ["notes.pdf"] if shard == "a.tar" else []
        subprocess.run(["tar", "-cf", str(root / shard), "-C", str(loose), *names], check=True)
    return root


def test_each_picture_is_the_one_that_the_tar_holds(folder: Path) -> None:
    source = DataSource(path=folder, shards="tar", max_left_out=0.5)
    listing = list_images(source, "x")
    photos = {photo.path.rpartition("::")[2]: photo for photo in scan(source, "x", listing)}
    assert sorted(photos) == [
        "0000.jpg",
        "0001.jpg",
        "0002.jpg",
        "0003.jpg",
        "0004.jpg",
        "0004.seg.png",
        "0005.jpg",
    ]
    for number in range(6):
        photo, data = photos[f"{number:04}.jpg"], _jpeg(number)
        assert photo.sha256 == hashlib.sha256(data).hexdigest()
        assert (photo.bytes, photo.width, photo.height) == (len(data), 100, 80)
        # Another reader of tars says where it is.
        shard = folder / shard_of(photo.path)
        with tarfile.open(shard) as tar:
            member = tar.getmember(f"{number:04}.jpg")
        assert photo.path == member_path(
            shard.relative_to(folder).as_posix(), member.offset_data, len(data), member.name
        )
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(read_rgb(folder / photo.path), np.asarray(image))
        assert read_header(folder / photo.path).width == 100
    assert photos["0004.seg.png"].error == "the file is empty"
    assert [(photos[f"{n:04}.jpg"].caption, photos[f"{n:04}.jpg"].label) for n in range(6)] == [
        *((f"caption {n}", str(n % 2)) for n in range(5)),
        ("of json", "1"),
    ]
    assert {item.path: item.kind for item in listing.left_out} == {"a.tar/notes.pdf": "other data"}
    assert captions_of(source, "x", listing.files).num_captions == 7  # 0004's, for both of its pictures


def test_headers_are_read_once_and_again_after_a_change(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = DataSource(path=folder, shards="tar")
    monkeypatch.setattr("orchestrator.data.sources.digests._RACY_NS", -(10**12))
    first = list_images(source, "x")
    read: list[str] = []
    plain = shards._read
    monkeypatch.setattr(shards, "_read", lambda path, *more: read.append(path.name) or plain(path, *more))
    assert list_images(source, "x") == first
    assert read == []
    with tarfile.open(folder / "a.tar", "a") as tar:
        member = tarfile.TarInfo("new.jpg")
        member.size = len(_jpeg(7))
        tar.addfile(member, io.BytesIO(_jpeg(7)))
    assert len(list_images(source, "x").files) == len(first.files) + 1
    assert read == ["a.tar"]


def test_the_key_follows_what_is_in_the_shards(folder: Path) -> None:
    source = DataSource(path=folder, shards="tar")
    first = fingerprint(source)
    (folder / "readme.txt").touch()
    assert fingerprint(source) == first
    with (folder / "a.tar").open("r+b") as file:
        file.seek(600)
        file.write(b"x")
    assert fingerprint(source) != first


def test_hostile_and_damaged_shards_are_reasons(folder: Path) -> None:
    with tarfile.open(folder / "evil.tar", "w") as tar:
        for name in ("../out.jpg", "/etc/x.jpg", ".hidden.jpg", "good.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(_jpeg(0))
            tar.addfile(member, io.BytesIO(_jpeg(0)))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (folder / "none.tar").write_bytes(b"no tar at all" * 100)
    whole = (folder / "a.tar").read_bytes()
    with tarfile.open(folder / "a.tar") as tar:
        last = tar.getmember("0002.jpg")
    (folder / "cut.tar").write_bytes(whole[: last.offset_data + 100])
    listing = list_images(DataSource(path=folder, shards="tar"), "x")
    reasons = {item.path: item.reason for item in listing.left_out}
    assert (
        reasons["evil.tar/../out.jpg"] == reasons["evil.tar//etc/x.jpg"] == "its name leads out of the shard"
    )
    assert reasons["evil.tar/link.jpg"] == "a link or a device in a shard"
    assert reasons["evil.tar/.hidden.jpg"] == "hidden"
    assert reasons["none.tar"].startswith("no shard that can be read")
    assert next(file for file in listing.files if file.startswith("evil")).endswith("::good.jpg")
    cut = [item.reason for item in listing.left_out if item.path.startswith("cut.tar")]
    assert any("ends" in reason or "unexpected" in reason for reason in cut)


def test_a_shard_that_shrank_is_an_unreadable_picture(folder: Path) -> None:
    path = list_images(DataSource(path=folder, shards="tar"), "x").files[2]
    with (folder / "a.tar").open("r+b") as file:
        file.truncate(700)
    with pytest.raises(UnreadableImage, match="the shard ends before it"):
        read_rgb(folder / path)


def test_part_of_a_shard_is_a_file_of_its_own(folder: Path) -> None:
    path = list_images(DataSource(path=folder, shards="tar"), "x").files[0]
    opened = open_member(folder / path)
    assert opened is not None
    file, size = opened
    with file:
        assert file.read() == _jpeg(0)
        assert (file.read(), size) == (b"", len(_jpeg(0)))
        file.seek(-10, io.SEEK_END)
        assert file.read(99) == _jpeg(0)[-10:]
        file.seek(5)
        assert (file.read(3), file.tell()) == (_jpeg(0)[5:8], 8)
    assert open_member("a.jpg") is None
    assert shard_of("sub/a.jpg") == "sub/a.jpg"


def test_threads_read_one_shard_at_once(folder: Path) -> None:
    files = [
        file for file in list_images(DataSource(path=folder, shards="tar"), "x").files if "seg" not in file
    ]
    wrong: list[str] = []

    def read() -> None:
        for _ in range(20):
            for number, file in enumerate(sorted(files, key=lambda file: file.rpartition("::")[2])):
                opened = open_member(folder / file)
                assert opened is not None
                with opened[0] as part:
                    if part.read() != _jpeg(number):
                        wrong.append(file)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_mistakes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="captions and labels of `shards` are in them"):
        DataSource(path=folder, shards="tar", labels="folders")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images"):
        list_images(DataSource(path=tmp_path / "empty", shards="tar"), "x")


def _member(name: str, data: bytes, kind: bytes = tarfile.REGTYPE, **pax: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.pax_headers = len(data), kind, pax
    return info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def _long(kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


END = bytes(2 * tarfile.BLOCKSIZE)


def _taken(root: Path, shard: bytes) -> tuple[list[str], list[str]]:
    """Names of pictures in a shard, and reasons; beside it is a shard of one picture."""
    root.mkdir(exist_ok=True)
    (root / "z.tar").write_bytes(_member("z.jpg", _jpeg(1)) + END)
    (root / "a.tar").write_bytes(shard)
    source = DataSource(path=root, shards="tar")
    listing = list_images(source, "x")
    assert len(fingerprint(source, "x", listing)) == 64
    assert not any(photo.error for photo in scan(source, "x", listing))
    names = [file.partition("::")[2].partition("::")[2] for file in listing.files]
    return names, [item.reason for item in listing.left_out]


@pytest.mark.parametrize("where", ["in a header", "in a picture", "before the end"])
def test_a_shard_that_was_cut_off_keeps_its_pictures_and_is_told(tmp_path: Path, where: str) -> None:
    whole = _member("0.jpg", _jpeg(0))
    more = {"in a header": 100, "in a picture": 700, "before the end": 0}[where]
    names, reasons = _taken(tmp_path / "cut", whole + _member("1.jpg", _jpeg(1))[:more])
    assert names == ["0.jpg", "z.jpg"]
    assert "the shard is cut off or damaged: what follows is not read" in reasons


def test_what_follows_the_end_of_a_shard_is_told(tmp_path: Path) -> None:
    one = _member("0.jpg", _jpeg(0)) + END
    assert _taken(tmp_path / "twice", one + one) == (
        ["0.jpg", "z.jpg"],
        ["something follows the end of the shard, and is not read"],
    )
    assert _taken(tmp_path / "padded", one + bytes(10240)) == (["0.jpg", "z.jpg"], [])


@pytest.mark.parametrize(
    "hostile",
    [
        _long(tarfile.XHDTYPE, 10 << 30),
        _long(tarfile.GNUTYPE_LONGNAME, 2**60),
        _long(tarfile.GNUTYPE_LONGNAME, 2**66),
        _long(tarfile.REGTYPE, 2**60),
        _member("back.jpg", b"", size="-1536"),
        _member("back.jpg", b"", a="b")[:1024] * 2000,
    ],
    ids=[
        "10 GiB of names",
        "an exbibyte",
        "more than 64 bits",
        "a large member",
        "leads back",
        "names of names",
    ],
)
def test_headers_that_lie_cost_their_shard_at_most(tmp_path: Path, hostile: bytes) -> None:
    names, reasons = _taken(tmp_path / "lies", _member("0.jpg", _jpeg(0)) + hostile + END)
    assert names in (["0.jpg", "z.jpg"], ["z.jpg"])
    assert reasons


def test_a_member_may_be_called_like_a_place_in_a_shard(tmp_path: Path) -> None:
    name = "x.tar::0:10::y.jpg"
    assert _taken(tmp_path / "named", _member(name, _jpeg(0)) + END) == ([name, "z.jpg"], [])
    assert shard_of(member_path("a.tar", 512, 20, name)) == "a.tar"


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("[" * 100_000, (None, None)),
        (r'{"caption": "a\ud800", "label": "\udc80"}', ("a?", "?")),
        ('{"caption": ["", "a leaf", "an oak"], "label": 3.0}', ("a leaf", "3")),
        ('{"caption": {"en": "a leaf"}, "label": NaN}', (None, None)),
    ],
    ids=["deep", "half characters", "lists and floats", "neither"],
)
def test_texts_of_json_are_texts_or_nothing(
    tmp_path: Path, told: str, said: tuple[str | None, str | None]
) -> None:
    (tmp_path / "a.tar").write_bytes(_member("0.jpg", _jpeg(0)) + _member("0.json", told.encode()) + END)
    source = DataSource(path=tmp_path, shards="tar")
    files = list_images(source, "x").files
    assert captions_of(source, "x", files).notes.get(files[0], (None, None)) == said


def test_a_shard_that_became_unreadable_counts_as_the_pictures_it_had(folder: Path) -> None:
    """Also at later looks; more than a set share stops with the shard's name."""
    source = DataSource(path=folder, shards="tar")
    assert len(list_images(source, "x").files) == 7
    (folder / "a.tar").write_bytes(b"no tar at all" * 1000)
    for _ in range(2):
        listing = list_images(source, "x")
        (found,) = (item for item in listing.left_out if item.path == "a.tar")
        assert (found.kind, found.pictures) == ("unreadable shard", 3)
        assert found.reason.endswith("it has 3 pictures")
    account = listing.account("x")
    assert (account.taken, account.lost) == (4, 3)
    assert account.by_kind == {"unreadable shard": 3}
    assert account.summary() == "3 unreadable shard (a.tar 3)"
    assert accounts.load(accounts.save([account], folder).parent)[0].by_kind == account.by_kind
    assert accounts.lost_too_many(account, 0.43, "data.x.max_left_out") is None
    error = accounts.lost_too_many(account, 0.42, "data.x.max_left_out")
    assert error is not None
    assert "3 unreadable shard (a.tar 3), such as a.tar. Is that intended?" in error.what
    assert "copy the shards again" in (error.hint or "")


def test_the_size_of_a_shard_that_nobody_knows_says_how_much_it_hides(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    size = (folder / "part" / "b.tar").stat().st_size
    (folder / "a.tar").write_bytes(b"x" * (10 * size))
    (folder / "tiny.tar").write_bytes(b"x")
    found = {item.path: item for item in list_images(DataSource(path=folder, shards="tar"), "x").left_out}
    assert found["a.tar"].pictures == 40
    assert found["a.tar"].reason.endswith("by its size it has about 40 pictures")
    assert found["tiny.tar"].pictures == 1
    assert found["tiny.tar"].reason.endswith("how many pictures it has is not known")


def test_a_shard_that_is_cut_off_counts_the_pictures_behind_the_cut(folder: Path) -> None:
    source = DataSource(path=folder, shards="tar")
    list_images(source, "x")
    with tarfile.open(folder / "a.tar") as tar:
        second = tar.getmember("0001.jpg")
    with (folder / "a.tar").open("r+b") as file:
        file.truncate(second.offset)
    for _ in range(2):
        listing = list_images(source, "x")
        (found,) = (item for item in listing.left_out if item.kind == "unreadable shard")
        assert (found.path, found.pictures) == ("a.tar", 2)
        assert "it had 2 more pictures" in found.reason
        assert sum(file.startswith("a.tar") for file in listing.files) == 1


def test_a_link_to_a_shard_that_is_gone_counts_the_pictures_it_had(folder: Path, tmp_path: Path) -> None:
    (folder / "a.tar").rename(tmp_path / "a.tar")
    (folder / "a.tar").symlink_to(tmp_path / "a.tar")
    source = DataSource(path=folder, shards="tar")
    list_images(source, "x")
    (tmp_path / "a.tar").unlink()
    (found,) = (item for item in list_images(source, "x").left_out if item.path == "a.tar")
    assert (found.kind, found.pictures) == ("unreadable shard", 3)
    assert "No such file" in found.reason
