"""Curation by what a network says of photos: its features, blocks that are taken up, and what can go wrong."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from pydantic import ValidationError
from sklearn.datasets import load_sample_image

from orchestrator.config.schema import DataSource
from orchestrator.data import decode as decoder
from orchestrator.data.decode import read_square
from orchestrator.data.index import ImageIndex
from orchestrator.data.sources import digests
from orchestrator.data.sources.folder import fingerprint
from orchestrator.errors import Stopped, UserError
from orchestrator.models import MEAN, STD, from_config, load_pretrained, preset, save_pretrained
from orchestrator.stages.common.network_source import NetworkSource, as_recorded
from orchestrator.stages.curate import curation, embed, embed_on_ray
from orchestrator.stages.curate.config import Curate
from orchestrator.storage.cache_folder import cache_folder

from .curating import curation_context

_SIZE = 32


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of any picture."""
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "model"
    torch.manual_seed(0)
    save_pretrained(folder, from_config(preset("vit_femto")).state_dict(), "vit_femto")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """25 different pictures and a copy."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(25):
        small = rng.integers(0, 255, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize((60, 40)).save(folder / f"{number:02}.png")
    (folder / "x-copy.png").write_bytes((folder / "03.png").read_bytes())
    return folder


def _stage(model: Path, **more: object) -> Curate:
    network = {"from": str(model), "size": _SIZE}
    return Curate(kind="curate", data="photos", clusters=[8, 3], embedding=network, **more)  # type: ignore[arg-type]


def test_photos_are_clustered_by_the_networks_image_features(
    photos: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "_BLOCK", 7)
    monkeypatch.setattr(embed, "_BATCH", 3)
    context = curation_context(tmp_path, photos=DataSource(path=photos))
    summary = _stage(model).run(context)
    assert (summary["unique"], summary["duplicates"], summary["clusters"]) == (25, 1, 3)
    index = ImageIndex.load(context.out)
    found = np.load(context.out / "embeddings.npy")
    squares = np.stack([read_square(index.path(row), _SIZE) for row in range(25)])
    images = torch.from_numpy(squares).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        wanted = load_pretrained(model).eval()((images - mean) / std).cls
    wanted = torch.nn.functional.normalize(wanted, dim=1).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_blocks_that_are_done_are_not_done_again(
    photos: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "_BLOCK", 7)
    read: list[str] = []
    plain = embed.square_of
    stop = threading.Event()

    def square(photo: embed.PhotoFile, size: int) -> object:
        read.append(photo.path.name)
        if photo.path.name == "20.png":
            stop.set()
        return plain(photo, size)

    monkeypatch.setattr(embed, "square_of", square)
    (tmp_path / "whole").mkdir()
    whole = curation_context(tmp_path / "whole", photos=DataSource(path=photos))
    _stage(model).run(whole)
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "another"))
    stop.clear()
    context = replace(curation_context(tmp_path, photos=DataSource(path=photos)), stop=stop)
    with pytest.raises(Stopped):
        _stage(model).run(context)
    done = len(list((tmp_path / "work" / "embedded").glob("*.npy")))
    assert 1 <= done < 4
    read.clear()
    again = curation_context(tmp_path, photos=DataSource(path=photos))
    _stage(model).run(again)
    assert len(read) == 25 - 7 * done
    for name in ("embeddings.npy", "index.parquet", "levels.npy"):
        assert (again.out / name).read_bytes() == (whole.out / name).read_bytes(), name


def test_a_photo_that_went_meanwhile_is_corrupt(
    photos: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = embed.embed_photos

    def later(*args: object, **kwargs: object) -> list[int]:
        (photos / "05.png").unlink()
        return plain(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(embed, "embed_photos", later)
    context = curation_context(tmp_path, photos=DataSource(path=photos))
    summary = _stage(model).run(context)
    assert (summary["unique"], summary["corrupt"]) == (24, 1)
    index = ImageIndex.load(context.out)
    assert "05.png" not in {index[row].path for row in range(len(index))}
    assert np.load(context.out / "embeddings.npy").shape[0] == len(index) == 24


def test_vectors_of_another_version_of_the_networks_code_are_not_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor those of pictures that another decoder read."""
    installed = {"timm": "1.0"}
    monkeypatch.setattr(embed, "version", installed.__getitem__)
    source = NetworkSource.model_validate({"timm": "any"})

    def found(computes_on: str = "cpu") -> dict[str, object]:
        cache = embed._Embedder(source, _SIZE, "here", "cpu", None, "weights", computes_on).cache
        known = dict(cache.find(["ab" * 32]))
        cache.note([("ab" * 32, np.ones(3, np.float32))])
        return known

    assert not found()
    assert found()
    installed["timm"] = "1.1"
    assert not found()
    assert found()
    for library in (torch, simplejpeg):
        monkeypatch.setattr(library, "__version__", "another")
        assert not found()
    assert found()
    assert not found("cuda"), "a GPU rounds in its own way"


@pytest.mark.parametrize(
    ("device", "actors", "gpus", "wanted"),
    [
        ("auto", None, 0, "cpu"),
        ("cpu", None, 4, "cpu"),
        ("cpu", 2, 4, "cpu"),
        ("auto", 2, 0, "cpu"),
        ("auto", 2, 4, "cuda"),
        ("gpu", 2, 4, "cuda"),
    ],
)
def test_the_device_is_that_of_who_holds_the_network(
    monkeypatch: pytest.MonkeyPatch, device: str, actors: int | None, gpus: int, wanted: str
) -> None:
    monkeypatch.setattr(embed_on_ray.ray, "cluster_resources", lambda: {"GPU": gpus})
    monkeypatch.setattr(embed, "device_type", lambda wanted: "cpu")
    assert embed._computes_on(device, actors) == wanted


def test_vectors_of_another_version_of_the_stage_are_not_taken_up(
    photos: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identities: list[object] = []

    def asked(*_: object, identity: str, **__: object) -> None:
        identities.append(identity)
        raise Stopped

    monkeypatch.setattr(embed, "embed_photos", asked)
    for later in (0, 0, 1):
        monkeypatch.setattr(Curate, "version", Curate.version + later)
        with pytest.raises(Stopped):
            _stage(model).run(curation_context(tmp_path, photos=DataSource(path=photos)))
    first, same, other = identities
    assert first == same != other


def test_what_is_no_number_is_told(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = {"module": "broken_network:Broken", "size": _SIZE}
    (tmp_path / "broken_network.py").write_text(
        "import torch\n\n\nclass Broken(torch.nn.Module):\n    def forward(self, images):\n"
        "        return torch.nn.functional.avg_pool2d(images, 8) * torch.nan\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    stage = Curate(kind="curate", data="photos", clusters=3, embedding=network)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="not finite"):
        stage.run(curation_context(tmp_path, photos=DataSource(path=photos)))


@pytest.mark.parametrize("said", [{}, {"mean": [0.5, 0.5, 0.5]}])
def test_other_processes_normalise_pixels_as_this_one(tmp_path: Path, said: dict[str, list[float]]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}))
    source = NetworkSource.model_validate({"from": tmp_path, **said})
    there = NetworkSource.model_validate(embed_on_ray.record_of(source))
    assert as_recorded(there) == as_recorded(source)
    assert as_recorded(there).mean == ((0.5, 0.5, 0.5) if said else (0.1, 0.2, 0.3))


def test_the_network_is_checked_before_anything_runs(model: Path, tmp_path: Path) -> None:
    stage = _stage(model)
    stage.check()
    assert set(stage.files()) == {"embedding.from"}
    assert stage.identity()["embedding"] != "thumbnail"
    missing = _stage(tmp_path / "nowhere")
    with pytest.raises(UserError) as raised:
        missing.check()
    assert raised.value.where == "embedding.from"
    odd = Curate(kind="curate", data="photos", embedding={"from": str(model), "size": 33})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="set its size to 32"):
        odd.check()
    with pytest.raises(ValidationError, match="exactly one of"):
        Curate(kind="curate", data="photos", embedding={"timm": "a", "module": "b:c"})  # type: ignore[arg-type]


def test_of_51_photos_one_is_new_and_is_decoded_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy elsewhere is known, too. Without what is remembered the result is the same to the last bit."""
    monkeypatch.setattr(embed, "_BLOCK", 16)
    # Files of this test are younger than what is trusted.
    monkeypatch.setattr(digests, "_RACY_NS", 0)
    photo = load_sample_image("china.jpg")
    folder = tmp_path / "photos"
    folder.mkdir()

    def write(number: int, name: str) -> None:
        top, left = 40 * (number // 10), 55 * (number % 10)
        Image.fromarray(photo[top : top + 60, left : left + 80]).save(folder / name, quality=95)

    for number in range(50):
        write(number, f"{number:02}.jpg")
    decoded: list[str] = []
    embedded: list[str] = []
    decode, square = decoder._decode, embed.square_of

    def counting_decode(data: bytes, path: Path, *rest: object) -> object:
        decoded.append(Path(path).name)
        return decode(data, path, *rest)  # type: ignore[arg-type]

    def counting_square(photo: embed.PhotoFile, size: int) -> object:
        embedded.append(photo.path.name)
        return square(photo, size)

    monkeypatch.setattr(decoder, "_decode", counting_decode)
    monkeypatch.setattr(embed, "square_of", counting_square)

    stage: Curate

    def curate(source: Path) -> Path:
        decoded.clear()
        embedded.clear()
        # The key of a stage follows its data.
        work = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        work.mkdir()
        context = curation_context(work, photos=DataSource(path=source))
        stage.run(context)
        return context.out

    # It shows a few photos at a size of its own, and draws them anew.
    monkeypatch.setattr(curation, "draw_clusters", lambda index, distances, path: path.touch())
    stage = Curate(kind="curate", data="photos", clusters=[8, 3], near_duplicate=0)
    curate(folder)
    assert len(decoded) == 50
    write(55, "10b.jpg")
    curate(folder)
    assert decoded == ["10b.jpg"]
    (folder / "10b.jpg").unlink()

    # A network sees photos at a size of its own.
    stage = _stage(model, near_duplicate=0)
    curate(folder)
    assert sorted(decoded) == sorted(embedded) == sorted(path.name for path in folder.iterdir())
    write(65, "20b.jpg")
    found = curate(folder)
    assert (decoded, embedded) == (["20b.jpg"] * 2, ["20b.jpg"])
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    fingerprint(DataSource(path=copy))
    curate(copy)
    assert (decoded, embedded) == ([], [])
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "another"))
    alone = curate(folder)
    assert (len(decoded), len(embedded)) == (102, 51)
    for name in ("embeddings.npy", "levels.npy", "index.parquet"):
        assert (alone / name).read_bytes() == (found / name).read_bytes(), name


def test_a_damaged_cache_is_done_without(photos: Path, model: Path, tmp_path: Path) -> None:
    cache_folder().mkdir(parents=True, exist_ok=True)
    (cache_folder() / "pictures.sqlite3").write_bytes(b"no database" * 1000)
    context = curation_context(tmp_path, photos=DataSource(path=photos))
    assert _stage(model).run(context)["unique"] == 25
