"""`orchestrator search`: the nearest images by brute force, from a folder or a file, for a photo or a text."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import command_line
from numpy.typing import NDArray
from PIL import Image

import orchestrator
from orchestrator.cli.use import numbered
from orchestrator.data.sources.folder import list_folder
from orchestrator.errors import UserError
from orchestrator.inference import embed_folder as embed_folder_module
from orchestrator.inference import search as search_module
from orchestrator.inference.embed_folder import made_of
from orchestrator.inference.embeddings import EmbeddedFile, open_embeddings, writing
from orchestrator.inference.search import nearest_images

from .pictures import READABLE, pixels


def here(folder: Path, *arguments: str, code: int = 0) -> str:
    ended, said = command_line(*arguments, folder=folder, toy=False)
    assert ended == code, said
    assert "Traceback" not in said
    return str(said)


def printed(said: str) -> list[tuple[str, float]]:
    """Path and similarity of each line of a search."""
    rows = [line.split() for line in said.splitlines() if "photos/" in line]
    return [(path, float(similarity)) for similarity, path in rows]


def embeddings(folder: Path, vectors_ND: NDArray[np.float32], rows: int = 7) -> Path:
    """A file with these vectors, in row groups of `rows`."""
    (folder / "one").mkdir()
    Image.fromarray(pixels(0)).save(folder / "one" / "a.png")
    made = made_of(folder / "one", list_folder(folder / "one"), "m", "w", 16)
    with writing(folder / "e.parquet", made, group_rows=rows) as writer:
        writer.add([EmbeddedFile(f"{row:03}.png", "0" * 64, 1) for row in range(len(vectors_ND))], vectors_ND)
        writer.finish([], [])
    return folder / "e.parquet"


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top", "block_rows"), [(1, 1000), (10, 3), (10, 1000), (200, 16)])
def test_the_nearest_are_those_of_all_similarities_at_once(tmp_path: Path, top: int, block_rows: int) -> None:
    rng = np.random.default_rng(0)
    vectors_ND = rng.standard_normal((100, 8)).astype(np.float32)
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    # Equal ones, in different blocks: they keep the order of the file.
    vectors_ND[[90, 40, 3]] = vectors_ND[17]
    query_D = vectors_ND[17]
    with open_embeddings(embeddings(tmp_path, vectors_ND)) as found:
        matches = nearest_images(found, query_D, top, block_rows=block_rows)
    similarities = vectors_ND.astype(np.float64) @ query_D.astype(np.float64)
    expected = np.argsort(-np.round(similarities, 6), kind="stable")[:top]
    assert [match.path for match in matches] == [f"{row:03}.png" for row in expected]
    assert [match.path for match in matches[:4]] == ["003.png", "017.png", "040.png", "090.png"][:top]
    np.testing.assert_allclose([match.similarity for match in matches], similarities[expected], atol=1e-6)


def test_what_is_no_number_is_near_to_nothing(tmp_path: Path) -> None:
    vectors_ND = np.eye(4, dtype=np.float32)
    vectors_ND[0] = np.nan
    with open_embeddings(embeddings(tmp_path, vectors_ND)) as found:
        matches = nearest_images(found, vectors_ND[2], 4)
        with pytest.raises(UserError, match="vectors have 4 values, the model's 3"):
            nearest_images(found, vectors_ND[2, :3], 4)
    assert [match.path for match in matches] == ["002.png", "001.png", "003.png", "000.png"]


# --- folders and files ------------------------------------------------------------------------------------------------


def test_a_photo_finds_itself_and_then_its_like(photos: Path, model: Path, tmp_path: Path) -> None:
    Image.fromarray(pixels(1)).save(photos / "twin.png")
    Image.fromarray(pixels(1)).save(tmp_path / "query.png")
    said = here(tmp_path, "search", "photos", "query.png", "--model", "./model", "--top", "4")
    found = printed(said)
    assert [path for path, _ in found[:2]] == ["photos/below/plain.png", "photos/twin.png"]
    assert [similarity for _, similarity in found[:2]] == [1.0, 1.0]
    assert len(found) == 4
    vectors = orchestrator.embed(model, [photos / name for name in (*READABLE, "twin.png")])
    cosines = vectors @ orchestrator.embed(model, tmp_path / "query.png")
    np.testing.assert_allclose([value for _, value in found], np.sort(cosines)[::-1][:4], atol=6e-4)
    assert "4 of 9 images, by cosine similarity; 4 images could not be read" in said


def test_a_second_search_embeds_nothing_until_something_changes(
    photos: Path, model: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded: list[int] = []
    real = embed_folder_module.embed_folder

    def noted(*arguments: object, **named: object) -> object:
        embedded.append(1)
        return real(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(search_module, "embed_folder", noted)

    def times(*more: str) -> int:
        embedded.clear()
        here(tmp_path, "search", "photos", "photos/large.jpg", "--model", "./model", *more)
        return len(embedded)

    assert times() == 1
    assert times() == 0
    shutil.copytree(model, tmp_path / "copy")
    assert times("--model", "./copy") == 0, "the same weights"
    assert times("--size", "24") == 1
    assert times() == 0, "each size has its own"
    Image.fromarray(pixels(9)).save(photos / "new.png")
    assert (times(), times()) == (1, 0)
    (photos / "new.png").unlink()
    assert (times(), times()) == (1, 0)
    status = (photos / "tiny.gif").stat()
    os.utime(photos / "tiny.gif", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert (times(), times()) == (1, 0)
    kept = sorted((cache / "embeddings").iterdir())
    assert len(kept) == 2, "one for each size"
    for path in kept:
        path.write_bytes(path.read_bytes()[:-20])
    assert (times(), times()) == (1, 0), "a damaged one is made again"


def test_a_file_names_the_model_that_it_was_made_with(photos: Path, model: Path, tmp_path: Path) -> None:
    here(tmp_path, "embed", "photos", "--model", "./model", "--out", "e.parquet", "--size", "24")
    photo = str(photos / "print.jpg")
    by_name = printed(here(tmp_path, "search", "e.parquet", photo))
    assert (by_name[0], len(by_name)) == ((str(photos / "print.jpg"), 1.0), 8)
    shutil.copytree(model, tmp_path / "copy")
    assert (
        printed(here(tmp_path, "search", "e.parquet", photo, "--model", "./copy", "--size", "24")) == by_name
    )
    said = here(tmp_path, "search", "e.parquet", photo, "--size", "16", code=2)
    assert "was made at 24 pixels, not 16" in said
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    said = here(tmp_path, "search", "e.parquet", photo, code=2)
    assert "was made with other weights than those of" in said


def test_a_text_finds_what_is_nearest_in_the_common_space(
    photos: Path, aligned: Path, tmp_path: Path
) -> None:
    said = here(tmp_path, "search", "photos", "--text", "a dog", "--model", str(aligned))
    vectors = orchestrator.embed(aligned, [photos / name for name in READABLE])
    cosines = vectors @ orchestrator.embed(aligned, texts=["a dog"])[0]
    order = np.argsort(-cosines, kind="stable")
    assert [path for path, _ in printed(said)] == [f"photos/{READABLE[row]}" for row in order]
    np.testing.assert_allclose([value for _, value in printed(said)], cosines[order], atol=6e-4)


def test_mistakes_are_one_error_and_nothing_is_embedded_for_them(
    photos: Path, model: Path, aligned: Path, tmp_path: Path, cache: Path
) -> None:
    for arguments, expected in (
        (["photos", "--model", "./model"], "either a photo or a text"),
        (
            ["photos", "photos/large.jpg", "--text", "a dog", "--model", "./model"],
            "either a photo or a text",
        ),
        (["photos", "--text", "a dog", "--model", "./model"], "no text tower"),
        (["photos", "photos/large.jpg"], "no model is named"),
        (["photos", "photos/empty.png", "--model", "./model"], "this is not an image: the file is empty"),
        (["photos", "nowhere.png", "--model", "./model"], "no such file   at   nowhere.png"),
        (["photos", "photos/pipe.jpg", "--model", "./model"], "this is not an image"),
        (["nowhere", "photos/large.jpg", "--model", "./model"], "nowhere does not exist"),
        (["photos/large.jpg", "photos/large.jpg"], "no embeddings can be read"),
        (["photos", "photos/large.jpg", "--model", str(aligned), "--size", "24"], "sees images at 16 pixels"),
        (["photos", "photos/large.jpg", "--model", "./model", "--top", "0"], "--top"),
    ):
        assert expected in here(tmp_path, "search", *arguments, code=2).replace("\n", " "), arguments
    assert not cache.exists()


def test_names_of_files_cannot_colour_the_terminal(model: Path, tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    Image.fromarray(pixels(1)).save(tmp_path / "odd" / "[red]\x1b[31m.png")
    said = here(tmp_path, "search", "odd", "odd/[red]\x1b[31m.png", "--model", "./model")
    assert r"odd/[red]\x1b[31m.png" in said
    assert "\x1b" not in said


@pytest.mark.parametrize(
    ("count", "said"), [(1, "1 image could not be read"), (1200, "1,200 images could not be read")]
)
def test_one_file_is_told_in_the_singular(count: int, said: str) -> None:
    assert numbered(count, "image could not be read", "images could not be read") == said
