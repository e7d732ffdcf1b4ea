"""Features in batches and threads are those of the module called image by image, on the pixels of `evaluate`."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import orchestrator
from orchestrator.data.decode import read_rgb, square
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.data.read_ahead import in_order
from orchestrator.errors import UserError
from orchestrator.inference import threads as threads_module
from orchestrator.inference.images import square_of
from orchestrator.inference.threads import fitting_threads, flops_of, threads_for
from orchestrator.models import build, load_pretrained, normalise, preprocess
from orchestrator.stages.common.aligned import load_aligned
from orchestrator.stages.evaluate.towers import Crops
from orchestrator.stages.serving import _load_pyfunc

from .pictures import READABLE, SIZE, pixels


def paths(photos: Path) -> list[Path]:
    return [photos / name for name in READABLE]


def alone(model: Path, photo: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """CLS (D,) and patches (P, D) of the module called directly."""
    with torch.no_grad():
        features = load_pretrained(model)(preprocess(read_rgb(photo, 2 * SIZE), SIZE))
    return features.cls[0].numpy(), features.patches[0].numpy()


# --- pixels ---------------------------------------------------------------------------------------------------------


def test_python_and_evaluation_see_the_same_pixels_as_preprocess(photos: Path) -> None:
    records = [ImageRecord("photos", name, str(photos), "0", 1, 1) for name in READABLE]
    seen_NHWC = Crops(ImageIndex(records), range(len(records)), lambda: None).at(SIZE)
    for photo, seen in zip(paths(photos), seen_NHWC, strict=True):
        assert np.array_equal(square_of(photo, SIZE), seen), photo
        normalised = normalise(torch.from_numpy(seen.transpose(2, 0, 1)[None].copy()))
        assert torch.equal(preprocess(read_rgb(photo, 2 * SIZE), SIZE), normalised), photo


@pytest.mark.parametrize("name", [name for name in READABLE if not name.endswith(".jpg")])
def test_an_open_image_is_seen_as_its_file(photos: Path, name: str) -> None:
    with Image.open(photos / name) as image:
        assert np.array_equal(square_of(image, SIZE), square_of(photos / name, SIZE))


def test_a_turned_photo_is_seen_upright(photos: Path) -> None:
    """EXIF 6: what is stored as its left column is its first row."""
    turned = square_of(photos / "below" / "deeper" / "turned.jpg", SIZE).astype(int)
    stored = pixels(4)
    assert abs(turned - square_of(np.rot90(stored, -1), SIZE)).mean() < 8
    assert abs(turned - square_of(stored, SIZE)).mean() > 20
    with Image.open(photos / "below" / "deeper" / "turned.jpg") as image:
        assert abs(turned - square_of(image, SIZE)).mean() < 8


def test_a_picture_without_pixels_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "none.gif").write_bytes(
        b"GIF89a" + bytes(7) + b",\0\0\0\0\0\0\0\0\0" + b"\x02\x02\x44\x01\0;"
    )
    with pytest.raises(UserError, match="this is not an image: "):
        square_of(tmp_path / "none.gif", SIZE)
    with pytest.raises(ValueError, match="no pixels"):
        square(np.zeros((0, 3, 3), np.uint8), SIZE)


def test_arrays_of_other_shapes_are_images_as_well() -> None:
    grey = pixels(0)[..., 0]
    assert np.array_equal(square_of(grey, SIZE), square_of(np.dstack([grey] * 3), SIZE))
    clear = np.dstack([pixels(0), np.zeros((40, 56), np.uint8)])
    assert (square_of(clear, SIZE) == 255).all(), "what is transparent is white"


@pytest.mark.parametrize(
    "image",
    [pixels(0).astype(np.float32), np.zeros((4, 4, 7), np.uint8), np.zeros(4, np.uint8), 5, b"x", None],
)
def test_what_is_no_image_is_one_error(image: object) -> None:
    with pytest.raises(UserError, match="this is not an image"):
        square_of(image, SIZE)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["model", "aligned"])
def test_a_served_model_sees_the_same_pixels(photos: Path, kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    files = [(photos / name).read_bytes() for name in READABLE]
    served = _load_pyfunc(str(folder)).predict({"image": files})
    np.testing.assert_allclose(served, orchestrator.embed(folder, paths(photos)), atol=1e-5)
    with pytest.raises(ValueError, match="row 0 of `image` is not an image: not an image of a known format"):
        _load_pyfunc(str(folder)).predict({"image": [b"%!PS-Adobe-3.0 EPSF-3.0\n"]})


# --- features -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "loaders"), [(1, 1), (3, 2), (32, 4)])
def test_features_are_those_of_the_module_image_by_image(
    photos: Path, model: Path, batch: int, loaders: int
) -> None:
    found = orchestrator.load(model).features(paths(photos), batch=batch, loaders=loaders)
    assert (found.cls.shape, found.patches.shape, found.grid) == ((8, 48), (8, 4, 48), (2, 2))
    assert found.cls.dtype == found.patches.dtype == np.float32
    for row, photo in enumerate(paths(photos)):
        cls_D, patches_PD = alone(model, photo)
        np.testing.assert_allclose(found.cls[row], cls_D, atol=2e-5)
        np.testing.assert_allclose(found.patches[row], patches_PD, atol=2e-5)
    assert np.ptp(found.cls, axis=0).min() > 1e-3, "images differ"


def test_a_forward_has_a_batch_and_no_more(photos: Path, model: Path) -> None:
    loaded = orchestrator.load(model)
    batches: list[tuple[int, ...]] = []
    loaded.module.register_forward_pre_hook(lambda module, given: batches.append(tuple(given[0].shape)))  # type: ignore[union-attr]
    loaded.features(paths(photos), batch=3, size=24)
    assert batches == [(3, 3, 24, 24), (3, 3, 24, 24), (2, 3, 24, 24)]


def test_one_image_and_none(photos: Path, model: Path) -> None:
    loaded = orchestrator.load(model)
    one = loaded.features(photos / "large.jpg")
    np.testing.assert_allclose(one.cls[0], alone(model, photos / "large.jpg")[0], atol=2e-5)
    none = loaded.features([])
    assert (none.cls.shape, none.patches.shape) == ((0, 48), (0, 4, 48))
    assert orchestrator.embed(loaded, []).shape == (0, 48)


def test_a_model_with_a_text_tower_gives_its_vision_towers_features(
    photos: Path, model: Path, aligned: Path
) -> None:
    pair = orchestrator.load(aligned)
    found, expected = pair.features(paths(photos)), orchestrator.load(model).features(paths(photos))
    np.testing.assert_allclose(found.patches, expected.patches, atol=1e-6)
    vectors = orchestrator.embed(pair, paths(photos), batch=3)
    known = load_aligned(aligned)
    for photo, vector in zip(paths(photos), vectors, strict=True):
        np.testing.assert_allclose(vector, known.embed_images([read_rgb(photo, 2 * SIZE)])[0], atol=1e-5)


def test_numbers_and_files_that_cannot_be_are_one_error(photos: Path, model: Path) -> None:
    loaded = orchestrator.load(model)
    for expected, call in (
        ("patches of 8 pixels do not fill 20", lambda: loaded.features([], size=20)),
        ("size is 0", lambda: loaded.features([], size=0)),
        ("batch is 0", lambda: loaded.features([], batch=0)),
        ("loaders is 0", lambda: loaded.features([], loaders=0)),
        ("loaders is -1", lambda: orchestrator.embed(loaded, [], loaders=-1)),
        ("this is not an image: the file is empty", lambda: loaded.features([photos / "empty.png"])),
        ("more pixels than the limit", lambda: loaded.features([photos / "large.jpg", photos / "huge.png"])),
        ("not a regular file", lambda: loaded.features([photos / "pipe.jpg"])),
    ):
        with pytest.raises(UserError, match=expected):
            call()


# --- threads --------------------------------------------------------------------------------------------------------


def test_what_is_read_ahead_is_bounded_and_in_order() -> None:
    lock, begun, taken, most = threading.Lock(), 0, 0, 0

    def read(number: int) -> int:
        nonlocal begun, most
        with lock:
            begun += 1
            most = max(most, begun - taken)
        return number

    found = []
    for number in in_order(read, range(100), loaders=3, ahead=5):
        with lock:
            taken += 1
        found.append(number)
    assert found == list(range(100))
    # The one that the loop body has in hand counts until it says so.
    assert 1 < most <= 6


def test_a_reader_that_fails_ends_the_loop_and_the_others() -> None:
    begun = []

    def read(number: int) -> int:
        begun.append(number)
        if number == 7:
            raise ValueError("seven")
        return number

    with pytest.raises(ValueError, match="seven"):
        list(in_order(read, range(10_000), loaders=2, ahead=4))
    assert len(begun) < 20


def test_small_work_gets_one_thread_and_large_work_all_that_the_user_set() -> None:
    unit = threads_module.FLOPS_PER_THREAD
    assert threads_for(0, 8) == threads_for(1.9 * unit, 8) == 1
    assert threads_for(2 * unit, 8) == 2
    assert threads_for(1000 * unit, 8) == 8
    assert threads_for(1000 * unit, 1) == 1
    with torch.device("meta"):
        nano, base = build("vit_nano"), build("vit_b")
    assert threads_for(flops_of(nano, 1, 64) or 0, 12) == 1, "one small picture"
    assert threads_for(flops_of(base, 32, 224) or 0, 12) == 12
    assert flops_of(nano, 4, 64) == 4 * (flops_of(nano, 1, 64) or 0)
    assert flops_of(torch.nn.Linear(2, 2), 1, 64) is None  # type: ignore[arg-type]


def test_threads_are_set_around_the_forward_and_put_back(model: Path, photos: Path, threads: int) -> None:
    loaded = orchestrator.load(model)
    seen: list[int] = []
    loaded.module.register_forward_pre_hook(lambda module, given: seen.append(torch.get_num_threads()))  # type: ignore[union-attr]
    loaded.features(paths(photos), batch=4)
    assert (seen, torch.get_num_threads()) == ([1, 1], threads)

    def fail(module: object, given: object) -> None:
        raise RuntimeError("broken")

    loaded.module.register_forward_pre_hook(fail)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="broken"):
        loaded.features(photos / "large.jpg")
    assert torch.get_num_threads() == threads
    with fitting_threads(None):
        assert torch.get_num_threads() == threads


def test_threads_that_embed_side_by_side_leave_what_the_user_set(threads: int) -> None:
    """The second one in must not take the first one's number for the user's."""
    inside, leave = threading.Event(), threading.Event()
    after: list[int] = []

    def first() -> None:
        with fitting_threads(0.0):
            inside.set()
            assert leave.wait(10)
        after.append(torch.get_num_threads())

    def second() -> None:
        with fitting_threads(0.0):
            assert torch.get_num_threads() == 1
            leave.set()
            one.join(10)
        after.append(torch.get_num_threads())

    one, two = threading.Thread(target=first), threading.Thread(target=second)
    one.start()
    assert inside.wait(10)
    two.start()
    two.join(10)
    assert after == [threads, threads]
    fresh: list[int] = []
    third = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    third.start()
    third.join(10)
    assert (fresh, torch.get_num_threads()) == ([threads], threads)
