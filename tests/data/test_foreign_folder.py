"""A folder from anywhere: nothing in it hangs, crashes, fills the memory or reaches a decoder that nobody named."""

from __future__ import annotations

import io
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orchestrator.config.schema import DataSource
from orchestrator.data import decode
from orchestrator.data.decode import UnreadableImage, read_rgb
from orchestrator.data.decoding_memory import SharedMemory
from orchestrator.data.sources import digests as digests_module
from orchestrator.data.sources import folder as folder_module
from orchestrator.data.sources.folder import fingerprint, list_images
from orchestrator.data.sources.scan import scan
from orchestrator.errors import TerminatedError, UserError
from orchestrator.fsio import open_regular, pieces_of


def _picture(height: int = 24, width: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def _bytes(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    (image or _picture()).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    photos = tmp_path / "photos"
    photos.mkdir()
    _picture(seed=1).save(photos / "a.jpg")
    _picture(seed=2).save(photos / "b.png")
    return photos


def _left_out(folder: Path) -> dict[str, str]:
    return {item.path: item.reason for item in list_images(DataSource(path=folder), "photos").left_out}


# --- the listing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["", "store", "deep/runs"])
def test_a_store_inside_is_left_out_so_that_the_key_stays(folder: Path, store: str) -> None:
    source = DataSource(path=folder)
    before = fingerprint(source)
    for part in ("ledger/toy", "pipelines/toy", "artifacts/curate-1", "work/curate-1", "mlartifacts/1"):
        (folder / store / part).mkdir(parents=True)
        _picture(seed=3).save(folder / store / part / "clusters.png")
    assert list_images(source, "photos").files == ("a.jpg", "b.png")
    assert fingerprint(source) == before
    name = f"{store}/artifacts" if store else "artifacts"
    assert _left_out(folder)[name] == "a folder of the store of a pipeline"


def test_folders_that_are_only_called_like_those_of_a_store_are_read(folder: Path) -> None:
    for part in ("artifacts", "work", "ledger"):
        (folder / part).mkdir()
        _picture(seed=3).save(folder / part / "c.png")
    files = list_images(DataSource(path=folder), "photos").files
    assert files == ("a.jpg", "artifacts/c.png", "b.png", "ledger/c.png", "work/c.png")


def test_what_is_no_readable_picture_is_left_out_with_its_reason(folder: Path) -> None:
    os.mkfifo(folder / "pipe.jpeg")
    listener = socket.socket(socket.AF_UNIX)
    here = os.open(folder, os.O_RDONLY)
    listener.bind(f"/proc/self/fd/{here}/socket.jpeg")
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "loop.jpg").symlink_to(folder / "loop.jpg")
    (folder / "null.png").symlink_to("/dev/null")
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jpeg")).write_bytes(_bytes("JPEG"))
    (folder / "x.heic").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "noending").write_bytes(_bytes("JPEG"))
    (folder / ".hidden.jpg").write_bytes(_bytes("JPEG"))
    (folder / "linked.jpg").symlink_to(folder / "a.jpg")
    (folder / "line\nfeed.jpeg").write_bytes(_bytes("JPEG"))
    source = DataSource(path=folder)
    listing = list_images(source, "photos")
    assert listing.files == ("a.jpg", "b.png", "line\nfeed.jpeg", "linked.jpg")
    assert _left_out(folder) == {
        "pipe.jpeg": "not a file but a pipe",
        "socket.jpeg": "not a file but a socket",
        "dangling.jpg": "a link that leads nowhere",
        "loop.jpg": "Too many levels of symbolic links",
        "null.png": "not a file but a character device",
        r"caf\xe9.jpeg": "its name is not UTF-8",
        "x.heic": "its name ends in .heic",
        "noending": "its name has no ending",
        ".hidden.jpg": "hidden",
    }
    assert all(photo.error is None for photo in scan(source, "photos"))
    assert len(fingerprint(source)) == 64
    listener.close()
    os.close(here)


def test_links_to_folders_are_followed_and_each_folder_is_walked_once(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "rice"
    elsewhere.mkdir(parents=True)
    _picture(seed=3).save(elsewhere / "c.jpg")
    (elsewhere / "back").symlink_to(folder)
    (folder / "again").symlink_to(elsewhere)
    (folder / "rice").symlink_to(elsewhere)
    (folder / "self").symlink_to(folder)
    listing = list_images(DataSource(path=folder), "photos")
    assert listing.files == ("a.jpg", "again/c.jpg", "b.png")
    assert _left_out(folder) == {
        "again/back": "the same folder as the source itself",
        "rice": "the same folder as again",
        "self": "the same folder as the source itself",
    }


def test_a_folder_of_nothing_but_odd_files_says_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for number in range(3):
        (tmp_path / "x" / f"{number}.heic").write_bytes(b"x")
    os.mkfifo(tmp_path / "x" / "p.jpg")
    with pytest.raises(UserError, match=r"only: 3 × its name ends in \.heic; 1 × not a file but a pipe"):
        list_images(DataSource(path=tmp_path / "x"), "photos")


def test_files_that_may_not_be_read_are_reported(folder: Path, tmp_path: Path) -> None:
    (folder / "secret.jpg").write_bytes(_bytes("JPEG"))
    (folder / "secret.jpg").chmod(0)
    (folder / "locked").mkdir()
    (folder / "locked").chmod(0)
    for parent in (
        tmp_path,
        *(one for one in tmp_path.parents if one.name.startswith(("pytest-", "popen-"))),
    ):
        parent.chmod(parent.stat().st_mode | 0o055)
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from orchestrator.data.sources.folder import list_images, fingerprint\n"
        "from orchestrator.data.sources.scan import scan\n"
        "from orchestrator.config.schema import DataSource\n"
        "if os.getuid() == 0:\n    os.setgid(65534); os.setuid(65534)\n"
        "source = DataSource(path=Path(sys.argv[1]))\n"
        "print({item.path: item.reason for item in list_images(source, 'x').left_out})\n"
        "print([photo.path for photo in scan(source, 'x')], len(fingerprint(source)))\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    (folder / "locked").chmod(0o700)
    assert "'locked': 'folder: Permission denied'" in said
    assert "'secret.jpg': 'no permission to read it'" in said
    assert "['a.jpg', 'b.png'] 64" in said


def test_a_file_that_goes_or_becomes_a_pipe_after_the_listing_is_one_corrupt_photo(folder: Path) -> None:
    source = DataSource(path=folder)
    listing = list_images(source, "photos")
    (folder / "a.jpg").unlink()
    (folder / "b.png").unlink()
    os.mkfifo(folder / "b.png")
    seen: list[int] = []
    assert [photo.error for photo in scan(source, "photos", listing, lambda: seen.append(1))] == [
        "No such file or directory",
        "not a regular file",
    ]
    assert len(seen) == 2, "what cannot be read is done with, too"


def test_a_folder_whose_own_name_is_not_utf8_is_one_message(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xff"))
    folder.mkdir()
    (folder / "a.jpg").write_bytes(_bytes("JPEG"))
    with pytest.raises(UserError, match=r"f\\xff is not UTF-8"):
        list_images(DataSource(path=folder), "photos")


def test_another_pixel_limit_is_another_fingerprint(folder: Path) -> None:
    prints = {fingerprint(DataSource(path=folder, **limit)) for limit in ({}, {"max_pixels": 100})}
    assert len(prints) == 2


# --- a corpus of damaged pictures -----------------------------------------------------------------------------------


def _jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(_bytes("JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def _png_claiming(width: int, height: int) -> bytes:
    data = bytearray(_bytes("PNG"))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def _gif_claiming(width: int, height: int) -> bytes:
    data = bytearray(_bytes("GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def _bmp_claiming(width: int, height: int) -> bytes:
    data = bytearray(_bytes("BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def _webp_claiming(width: int, height: int) -> bytes:
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunks = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + canvas + _bytes("WEBP")[12:]
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


def _tiff_claiming(width: int, height: int) -> bytes:
    data = bytearray(_bytes("TIFF"))
    start = struct.unpack("<I", data[4:8])[0]
    for entry in range(struct.unpack("<H", data[start : start + 2])[0]):
        at = start + 2 + 12 * entry
        tag = struct.unpack("<H", data[at : at + 2])[0]
        if tag in (256, 257):
            data[at + 2 : at + 12] = struct.pack("<HII", 4, 1, width if tag == 256 else height)
    return bytes(data)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
CLAIMS: dict[str, Callable[[int, int], bytes]] = {
    "jpg": _jpeg_claiming,
    "png": _png_claiming,
    "gif": _gif_claiming,
    "bmp": _bmp_claiming,
    "webp": _webp_claiming,
    "tif": _tiff_claiming,
}


@pytest.mark.parametrize("ending", CLAIMS)
def test_a_claimed_size_over_the_limit_is_refused_before_anything_is_decoded(
    ending: str, tmp_path: Path
) -> None:
    (tmp_path / f"bomb.{ending}").write_bytes(CLAIMS[ending](16000, 16000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnreadableImage, match=r"more (pixels )?than the limit of 120,000,000"):
        read_rgb(tmp_path / f"bomb.{ending}")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


@pytest.mark.parametrize("ending", CLAIMS)
def test_the_limit_is_the_same_for_every_format(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"p.{ending}"
    _picture(20, 30).save(path)
    assert read_rgb(path, max_pixels=600).shape == (20, 30, 3)
    with pytest.raises(UnreadableImage, match="30 × 20 pixels are more than the limit of 599"):
        read_rgb(path, max_pixels=599)


def test_a_higher_limit_than_pillows_own_is_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    _picture(20, 30).save(tmp_path / "p.png")
    assert read_rgb(tmp_path / "p.png", max_pixels=600).shape == (20, 30, 3)


def test_a_large_tile_of_a_small_tiff_is_refused(tmp_path: Path) -> None:
    data = zlib.compress(bytes(256))
    tags = {
        256: 16,
        257: 16,
        258: 8,
        259: 8,
        262: 1,
        277: 1,
        322: 60000,
        323: 60000,
        324: 200,
        325: len(data),
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    (tmp_path / "t.tif").write_bytes(head.ljust(200, b"\0") + data)
    with pytest.raises(UnreadableImage, match="tiles of 60,000 × 60,000 pixels"):
        read_rgb(tmp_path / "t.tif")


def test_only_the_named_formats_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An EPS would start Ghostscript, a PPM or ICO another of Pillow's seventy decoders."""
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *command, **options: started.append(command))
    monkeypatch.setattr(subprocess, "check_call", lambda *command, **options: started.append(command))
    shapes = {
        "eps.jpg": EPS,
        "ppm.png": _bytes("PPM"),
        "ico.gif": _bytes("ICO"),
        "pcx.jpg": _bytes("PCX"),
    }
    for name, data in shapes.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UnreadableImage, match="not an image of a known format"):
            read_rgb(tmp_path / name)
    assert not started


def test_an_ending_that_lies_costs_no_picture(tmp_path: Path) -> None:
    (tmp_path / "really.jpg").write_bytes(_bytes("PNG"))
    assert np.array_equal(read_rgb(tmp_path / "really.jpg"), np.asarray(_picture()))


def _outcome(path: Path) -> np.ndarray | str:
    """The pixels, or the reason why there are none."""
    try:
        return read_rgb(path, max_pixels=10**6)
    except UnreadableImage as error:
        return error.reason[:250] or "no reason"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF"])
def test_no_damage_is_anything_but_a_picture_or_one_reason(kind: str, tmp_path: Path) -> None:
    """Cut anywhere, flipped anywhere, zeroed, repeated: never another exception, and the same bytes each time."""
    whole = _bytes(kind)
    rng = np.random.default_rng(list(kind.encode()))
    outcomes = {"whole": 0, "refused": 0}
    for number in range(60):
        data = bytearray(whole)
        at = int(rng.integers(0, len(data)))
        match number % 4:
            case 0:
                del data[at:]
            case 1:
                data[at] ^= 1 << int(rng.integers(0, 8))
            case 2:
                data[at : at + 40] = bytes(len(data[at : at + 40]))
            case _:
                data[at:at] = data[: at // 2]
        path = tmp_path / f"{number}.{kind.lower()}"
        path.write_bytes(data)
        first, second = (_outcome(path) for _ in range(2))
        assert np.array_equal(first, second)
        outcomes["refused" if isinstance(first, str) else "whole"] += 1
    assert outcomes["refused"] > 5, outcomes


def test_the_corpus_is_reported_file_by_file(folder: Path) -> None:
    corpus = {
        "bomb.jpg": _jpeg_claiming(65500, 65500),
        "cut.png": _bytes("PNG")[:200],
        "empty.gif": b"",
        "eps.jpg": EPS,
        "text.webp": b"no picture",
        "begins.tif": b"II*\0 and nothing more",
    }
    for name, data in corpus.items():
        (folder / name).write_bytes(data)
    reasons = {photo.path: photo.error for photo in scan(DataSource(path=folder), "photos")}
    assert reasons.pop("a.jpg") is None
    assert reasons.pop("b.png") is None
    assert set(reasons) == set(corpus)
    assert "65,500 × 65,500 pixels are more than the limit" in str(reasons["bomb.jpg"])
    assert reasons["empty.gif"] == "the file is empty"
    assert (
        reasons["eps.jpg"]
        == "not an image of a known format (JPEG, PNG, WEBP, GIF, BMP, TIFF, JPEG2000, AVIF)"
    )
    assert all(reasons.values())


# --- memory ---------------------------------------------------------------------------------------------------------


def test_large_pictures_do_not_pile_up_over_threads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of what eight threads decode at once stays in the shared amount."""
    pixels = 300 * 400
    for number in range(12):
        _picture(300, 400, number).save(folder / f"{number}.png")
    monkeypatch.setattr(decode, "_memory", SharedMemory(2 * 16 * pixels))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    inside, most, lock = 0, 0, threading.Lock()
    plain = decode._decode

    def counted(*arguments: object) -> np.ndarray:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.01)
        try:
            return plain(*arguments)  # type: ignore[arg-type]
        finally:
            with lock:
                inside -= 1

    monkeypatch.setattr(decode, "_decode", counted)
    photos = scan(DataSource(path=folder), "photos")
    assert all(photo.error is None for photo in photos)
    assert most <= 4, "the two small ones may run beside two large ones"


# --- files that are larger than pictures ----------------------------------------------------------------------------


def test_a_file_of_more_bytes_than_a_picture_is_not_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(DataSource(path=folder))
    (folder / "big.jpg").touch()
    os.truncate(folder / "big.jpg", 300 << 30)
    (folder / "link.png").symlink_to("big.jpg")
    opened: list[str] = []
    monkeypatch.setattr(
        digests_module, "open_regular", lambda path: opened.append(path.name) or open_regular(path)
    )
    source = DataSource(path=folder)
    assert fingerprint(source) == before
    assert sorted(opened) == ["a.jpg", "b.png"]
    reason = "322,122,547,200 bytes are more than 120,000,000 pixels take"
    assert _left_out(folder) == {"big.jpg": reason, "link.png": reason}
    assert [image.path for image in scan(source, "photos")] == ["a.jpg", "b.png"]


def test_a_file_that_grows_while_it_is_read_is_no_part_of_the_digest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(DataSource(path=folder))
    (folder / "c.png").write_bytes(b"x" * 5_000_000)
    assert fingerprint(DataSource(path=folder)) != before
    # As if it had been small when it was listed.
    monkeypatch.setattr(folder_module, "most_bytes", lambda max_pixels: 4_000_000)
    assert fingerprint(DataSource(path=folder)) == before


def test_a_file_that_would_have_to_be_waited_for_is_unreadable(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Waits(io.BytesIO):
        def fileno(self) -> int:
            return opened.fileno()

        def read(self, size: int | None = -1) -> bytes:
            return None  # type: ignore[return-value]  # what a BufferedReader says

    with (folder / "a.jpg").open("rb") as opened:
        monkeypatch.setattr(decode, "open_regular", lambda path: Waits())
        with pytest.raises(UnreadableImage, match="temporarily unavailable"):
            read_rgb(folder / "a.jpg")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_reading_of_large_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    (folder / "c.png").touch()
    os.truncate(folder / "c.png", 500 << 20)
    seen, main = [], threading.main_thread().ident
    assert main is not None

    def pieces(file: io.BufferedReader, most: int) -> Iterator[bytes]:
        for piece in pieces_of(file, most):
            seen.append(len(piece))
            if len(seen) == 10:
                signal.pthread_kill(main, number)
            elif len(seen) > 10:
                time.sleep(0.01)
            yield piece

    def end(number: int, frame: object) -> None:
        raise TerminatedError

    monkeypatch.setattr(digests_module, "pieces_of", pieces)
    before = signal.signal(number, end)
    try:
        with pytest.raises(TerminatedError):
            fingerprint(DataSource(path=folder))
    finally:
        signal.signal(number, before)
    for thread in threading.enumerate():
        if thread.name.startswith("photos"):
            thread.join()
    assert sum(seen) < 500 << 20
