"""`orchestrator embed`: a vector for each image, an account of each file, and memory that does not grow."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from command_line import command_line
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import normalize

import orchestrator
from orchestrator.data.decode import read_rgb
from orchestrator.data.sources.folder import LeftOut, Listing, list_folder
from orchestrator.errors import UserError
from orchestrator.inference import embedded_parts, forward
from orchestrator.inference.embed_folder import Embedded, by_reason, embed_folder, made_of
from orchestrator.inference.embeddings import Embeddings, EmbeddingsWriter, checked_target, open_embeddings
from orchestrator.models import load_pretrained, preprocess

from .pictures import LEFT_OUT, READABLE, SIZE, UNREADABLE, pixels

ROOT = Path(__file__).parents[2]


def here(folder: Path, *arguments: str, code: int = 0) -> str:
    ended, said = command_line(*arguments, folder=folder, toy=False)
    assert ended == code, said
    assert "Traceback" not in said
    return str(said)


def embedded(model: Path, photos: Path, out: Path, **how: int) -> Embedded:
    listing = list_folder(photos)
    settings = {"batch": 3, "loaders": 2, **how}
    made = made_of(photos, listing, "model", "w" * 64, SIZE)
    return embed_folder(orchestrator.load(model), listing, out, made, **settings)  # type: ignore[arg-type]


def table(path: Path) -> dict[str, list[object]]:
    columns: dict[str, list[object]] = pq.ParquetFile(path).read().to_pydict()
    return columns


def alone(model: Path, photo: Path) -> NDArray[np.float32]:
    """The vector of the module called directly."""
    with torch.no_grad():
        cls = load_pretrained(model)(preprocess(read_rgb(photo, 2 * SIZE), SIZE)).cls
    found: NDArray[np.float32] = normalize(cls, dim=-1)[0].numpy()
    return found


# --- what is in the file ----------------------------------------------------------------------------------------------


def test_vectors_are_those_of_the_module_image_by_image(photos: Path, model: Path, tmp_path: Path) -> None:
    said = here(tmp_path, "embed", "photos", "--model", "./model", "--out", "out/e.parquet", "--batch", "3")
    columns = table(tmp_path / "out" / "e.parquet")
    assert columns["path"] == list(READABLE), "in order, subfolders and all"
    for name, sha256, size, vector in zip(*columns.values(), strict=True):
        data = (photos / str(name)).read_bytes()
        assert (sha256, size) == (hashlib.sha256(data).hexdigest(), len(data))
        np.testing.assert_allclose(np.array(vector), alone(model, photos / str(name)), atol=2e-5)
    kind = pq.ParquetFile(tmp_path / "out" / "e.parquet").schema_arrow.field("vector").type
    assert pa.types.is_fixed_size_list(kind)
    assert (kind.list_size, kind.value_type) == (48, pa.float32())
    assert "✓ 8 images of photos are in out/e.parquet: vectors of 48 values" in said
    assert "images/s" in said


def test_every_file_is_accounted_for(photos: Path, model: Path, tmp_path: Path) -> None:
    said = here(tmp_path, "embed", "photos", "--model", "./model", "--out", "e.parquet")
    assert "! 4 image files cannot be read: " in said
    for reason in (
        "the file is empty",
        "more pixels than the limit of 120,000,000",
        "not an image of a known format",
        "corrupt JPEG",
    ):
        assert reason in said
    assert "2 other files are not images: " in said
    assert "1 × its name ends in .txt" in said
    assert "1 × not a file but a pipe" in said
    record = json.loads(pq.read_metadata(tmp_path / "e.parquet").metadata[b"orchestrator.embeddings"])
    assert sorted(record["left_out_files"]) == sorted((*UNREADABLE, *LEFT_OUT))
    assert sum(record["left_out"].values()) == 6
    assert record["unreadable"] == 4
    everything = {path.relative_to(photos).as_posix() for path in photos.rglob("*") if not path.is_dir()}
    assert everything == {*READABLE, *UNREADABLE, *LEFT_OUT}


def test_the_same_folder_gives_the_same_bytes(photos: Path, model: Path, tmp_path: Path) -> None:
    for name, loaders in (("a", 1), ("b", 4)):
        embedded(model, photos, tmp_path / f"{name}.parquet", loaders=loaders)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_a_model_with_a_text_tower_embeds_into_the_space_of_its_texts(
    photos: Path, aligned: Path, tmp_path: Path
) -> None:
    embedded(aligned, photos, tmp_path / "e.parquet")
    vectors = np.array(table(tmp_path / "e.parquet")["vector"])
    expected = orchestrator.embed(aligned, [photos / name for name in READABLE])
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert vectors.shape == (8, 12)


# --- in parts ---------------------------------------------------------------------------------------------------------


def test_only_a_batch_is_computed_and_a_row_group_collected_at_a_time(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 40 images: forwards of 4, row groups of 6, and never more vectors waiting than a batch and a group."""
    (tmp_path / "many").mkdir()
    for number in range(40):
        Image.fromarray(pixels(number)).save(tmp_path / "many" / f"{number:02}.png")
    groups: list[int] = []
    waiting: list[int] = []
    write, add = EmbeddingsWriter._write, EmbeddingsWriter.add

    def noted_write(self: EmbeddingsWriter, count: int) -> None:
        groups.append(count)
        waiting.append(len(self._files))
        write(self, count)

    def noted_add(self: EmbeddingsWriter, files: list[object], vectors_ND: NDArray[np.float32]) -> None:
        assert len(files) == len(vectors_ND) == 4
        add(self, files, vectors_ND)  # type: ignore[arg-type]

    monkeypatch.setattr(EmbeddingsWriter, "_write", noted_write)
    monkeypatch.setattr(EmbeddingsWriter, "add", noted_add)
    told: list[tuple[int, int]] = []
    embedded(
        model, tmp_path / "many", tmp_path / "e.parquet", batch=4, group_rows=6,
        progress=lambda *done: told.append(done),  # type: ignore[arg-type]
    )  # fmt: skip
    assert groups == [6, 6, 6, 6, 6, 6, 4]
    assert max(waiting) < 4 + 6
    assert told == [(done, 40) for done in (*range(0, 41, 4), 40)]
    parquet = pq.ParquetFile(tmp_path / "e.parquet")
    assert [parquet.metadata.row_group(at).num_rows for at in range(parquet.num_row_groups)] == groups
    names = [f"{number:02}.png" for number in range(40)]
    assert table(tmp_path / "e.parquet")["path"] == names
    with open_embeddings(tmp_path / "e.parquet") as found:
        blocks = [(paths.to_pylist(), vectors_ND) for paths, vectors_ND in found.blocks(7)]
    assert max(len(vectors_ND) for _, vectors_ND in blocks) <= 7
    assert [name for block, _ in blocks for name in block] == names
    vectors_ND = np.concatenate([vectors_ND for _, vectors_ND in blocks])
    for at in (0, 5, 6, 39):
        np.testing.assert_allclose(vectors_ND[at], alone(model, tmp_path / "many" / names[at]), atol=2e-5)


@pytest.mark.parametrize(("width", "rows"), [(1024, 2048), (384, 5461), (48, 8192)])
def test_row_groups_are_as_large_as_their_vectors_say_up_to_a_number_of_rows(
    width: int, rows: int, tmp_path: Path
) -> None:
    writer = EmbeddingsWriter(
        tmp_path / "e.parquet", made_of(tmp_path, list_of(tmp_path), "m", "w", 16), None
    )
    writer.add([], np.zeros((0, width), np.float32))
    assert writer._group_rows == rows
    writer.abandon()


def list_of(folder: Path) -> Listing:
    Image.fromarray(pixels(0)).save(folder / "one.png")
    return list_folder(folder)


# --- atomic -----------------------------------------------------------------------------------------------------------


def test_a_file_that_is_not_whole_is_not_there(
    photos: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "e.parquet"
    out.parent.mkdir()
    embedded(model, photos, out)
    before = out.read_bytes()

    def interrupt(*done: int) -> None:
        if done[0] > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedded(model, photos, out, group_rows=1, progress=interrupt)  # type: ignore[arg-type]
    assert [path.name for path in out.parent.iterdir()] == ["e.parquet"]
    assert out.read_bytes() == before
    (photos / "plain.png").touch()
    Image.fromarray(pixels(9)).save(photos / "new.png")
    embedded(model, photos, out)
    assert "new.png" in table(out)["path"], "one that is there is replaced"


KILLED = """
import os, signal, sys
from pathlib import Path
import orchestrator
from orchestrator.data.sources.folder import list_folder
from orchestrator.inference.embed_folder import embed_folder, made_of

model, photos, out, size, after = sys.argv[1:]
listing = list_folder(Path(photos))
made = made_of(Path(photos), listing, "model", "w" * 64, int(size))

def progress(done, total):
    if done >= int(after):
        os.kill(os.getpid(), signal.SIGKILL)

embed_folder(
    orchestrator.load(model), listing, Path(out), made, batch=3, loaders=2, group_rows=4, part_s=0.0, progress=progress
)
"""


@pytest.mark.heavy
def test_one_that_was_killed_goes_on_and_ends_with_the_same_bytes(
    photos: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(20):
        Image.fromarray(pixels(number)).save(photos / f"more-{number:02}.png")
    (tmp_path / "out").mkdir()
    whole, out = tmp_path / "whole.parquet", tmp_path / "out" / "e.parquet"
    embedded(model, photos, whole, group_rows=4)

    def interrupt(*done: int) -> None:
        if done[0] > 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedded(model, photos, out, group_rows=4, part_s=0, progress=interrupt)  # type: ignore[arg-type]
    (parts,) = out.parent.glob(".*.unfinished")
    first = {path.name for path in parts.glob("part-*")}
    assert first
    arguments = map(str, (model, photos, out, SIZE, 20))  # of 32 image files, four of which cannot be read
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=env, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    assert not out.exists()
    assert {path.name for path in parts.glob("part-*")} > first
    calls: list[int] = []
    real = forward.image_vectors

    def counted(module: Any, squares: Any) -> Any:
        calls.append(len(squares))
        return real(module, squares)

    monkeypatch.setattr(forward, "image_vectors", counted)
    told: list[int] = []

    def note(*done: int) -> None:
        told.append(done[0])

    found = embedded(model, photos, out, group_rows=4, progress=note)  # type: ignore[arg-type]
    assert 7 < told[0] < told[-1] == 32, "first, what the earlier ones have done"
    assert out.read_bytes() == whole.read_bytes()
    assert found.num_before + sum(calls) == found.num_images == 28
    assert 0 < sum(calls) <= 12
    assert len(found.unreadable) == 4
    assert [path.name for path in out.parent.iterdir() if "unfinished" in path.name] == []


@pytest.mark.parametrize("change", ["batch", "photos", "damage"])
def test_parts_that_do_not_fit_are_not_used(
    photos: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    out = tmp_path / "e.parquet"

    def interrupt(*done: int) -> None:
        if done[0] > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedded(model, photos, out, part_s=0, progress=interrupt)  # type: ignore[arg-type]
    parts = sorted((tmp_path / ".e.parquet.unfinished").iterdir())
    assert len(parts) == 2
    if change == "photos":
        os.utime(photos / "clear.png", ns=(1, 1))
    if change == "damage":
        parts[0].write_bytes(parts[0].read_bytes()[:-9])
    found = embedded(model, photos, out, batch=2 if change == "batch" else 3)
    assert found.num_before == 0
    assert table(out)["path"] == list(READABLE)
    assert not parts[0].parent.exists()


def test_a_link_in_place_of_the_parts_costs_nobody_a_file(photos: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "dear").mkdir()
    for name in ("letter.txt", "part-0000000000.parquet"):
        (tmp_path / "dear" / name).write_text("dear")
    (tmp_path / ".e.parquet.unfinished").symlink_to(tmp_path / "dear")
    embedded(model, photos, tmp_path / "e.parquet", part_s=0)
    assert table(tmp_path / "e.parquet")["path"] == list(READABLE)
    assert {path.read_text() for path in (tmp_path / "dear").iterdir()} == {"dear"}
    assert len(list((tmp_path / "dear").iterdir())) == 2


def test_a_folder_of_parts_with_other_files_loses_its_parts_alone(
    photos: Path, model: Path, tmp_path: Path
) -> None:
    parts = tmp_path / ".e.parquet.unfinished"
    (parts / "deep").mkdir(parents=True)
    (parts / "letter.txt").write_text("dear")
    os.mkfifo(parts / "part-0000000000.parquet")
    embedded(model, photos, tmp_path / "e.parquet", part_s=0)
    assert sorted(path.name for path in parts.iterdir()) == ["deep", "letter.txt"]


def test_parts_of_another_user_are_not_used(
    photos: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*done: int) -> None:
        if done[0] > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedded(model, photos, tmp_path / "e.parquet", part_s=0, progress=interrupt)  # type: ignore[arg-type]
    before = sorted((tmp_path / ".e.parquet.unfinished").iterdir())
    monkeypatch.setattr(embedded_parts.os, "geteuid", lambda: os.getuid() + 1)
    assert embedded(model, photos, tmp_path / "e.parquet", part_s=0).num_before == 0
    assert sorted((tmp_path / ".e.parquet.unfinished").iterdir()) == before


@pytest.mark.parametrize("seen", [0, -4, 1, 100])
def test_a_part_that_accounts_for_other_files_than_its_own_is_not_used(
    photos: Path, model: Path, tmp_path: Path, seen: int
) -> None:
    """With 0 it would be read for ever."""

    def interrupt(*done: int) -> None:
        if done[0] > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedded(model, photos, tmp_path / "e.parquet", part_s=0, progress=interrupt)  # type: ignore[arg-type]
    first = min((tmp_path / ".e.parquet.unfinished").iterdir())
    part = pq.read_table(first)
    record = json.loads(part.schema.metadata[b"orchestrator.embeddings.part"])
    changed = {"orchestrator.embeddings.part": json.dumps(record | {"seen": seen})}
    pq.write_table(part.replace_schema_metadata(changed), first)
    assert embedded(model, photos, tmp_path / "e.parquet").num_before == 0
    assert table(tmp_path / "e.parquet")["path"] == list(READABLE)


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.heavy
def test_mistakes_are_said_before_anything_is_computed(photos: Path, model: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.txt").touch()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").touch()
    before = sorted(path.name for path in tmp_path.iterdir())
    for arguments, expected in (
        (["nowhere"], "nowhere does not exist"),
        (["model/config.json"], "config.json is not a folder"),
        (["none"], "there are no images in none, only: 1 × its name ends in .txt"),
        (["bad"], "none of the 1 image files in"),
        (["photos", "--size", "20"], "patches of 8 pixels do not fill 20"),
        (["photos", "--model", "no-such"], "there is no folder 'no-such' here"),
        (["photos", "--model", "photos"], "no model can be loaded"),
        (["photos", "--out", "photos"], "photos is a folder"),
        (["photos", "--out", "model/config.json"], "is not a file of embeddings that could be replaced"),
        (["photos", "--out", "photos/pipe.jpg"], "is not a file of embeddings that could be replaced"),
        (["photos", "--out", "model/config.json/e.parquet"], "cannot be made"),
        (["photos", "--loaders", "0"], "--loaders"),
    ):
        defaults = [] if "--model" in arguments else ["--model", "./model"]
        defaults += [] if "--out" in arguments else ["--out", "e.parquet"]
        said = here(tmp_path, "embed", *arguments, *defaults, code=2)
        assert expected in said.replace("\n", " "), said
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (photos / "pipe.jpg").is_fifo()


def test_a_folder_without_permission_is_named_before_anything_is_embedded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write everywhere, so the answer of the system is replaced.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match="no permission to write into") as caught:
        checked_target(tmp_path / "food.parquet")
    assert "--out" in (caught.value.hint or "")


def test_files_that_are_no_embeddings_or_damaged_are_one_error(
    photos: Path, model: Path, tmp_path: Path
) -> None:
    good = tmp_path / "good.parquet"
    embedded(model, photos, good)
    whole = good.read_bytes()
    cases = {"empty": b"", "text": b"no parquet", "cut": whole[:-50], "torn": whole[:200] + whole[300:]}
    for name, data in cases.items():
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(data)
        with pytest.raises(UserError) as caught, open_embeddings(path) as found:
            list(found.blocks())
        assert "orchestrator embed" in (caught.value.hint or ""), name
    pq.write_table(pa.table({"path": ["a"]}), tmp_path / "other.parquet")
    os.mkfifo(tmp_path / "pipe.parquet")
    for name in ("other.parquet", "pipe.parquet", "nowhere.parquet"):
        with pytest.raises(UserError), open_embeddings(tmp_path / name):
            pass


@pytest.mark.parametrize(
    "record",
    ["[]", "{", "null", '{"format": 1}', '{"format": "x"}', '{"format": 2}', '{"format": 1, "model": 3}'],
)
def test_a_record_from_anywhere_is_one_error(tmp_path: Path, record: str) -> None:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array([1.0, 0.0], pa.float32()), 2)
    schema = pa.table({"path": ["a"], "vector": vectors}).replace_schema_metadata(
        {"orchestrator.embeddings": record}
    )
    pq.write_table(schema, tmp_path / "e.parquet")
    with pytest.raises(UserError), open_embeddings(tmp_path / "e.parquet"):
        pass


@pytest.mark.parametrize(
    ("columns", "record"),
    [
        ({"path": None}, {}),
        ({"path": [1]}, {}),
        ({"path": [b"a"]}, {}),
        ({}, {"folder": 5}),
        ({}, {"folder": "a\0b"}),
        ({}, {"model": []}),
        ({}, {"size": "16"}),
        ({}, {"size": True}),
    ],
)
def test_columns_and_values_from_anywhere_are_one_error(
    tmp_path: Path, columns: dict[str, Any], record: dict[str, Any]
) -> None:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array([1.0, 0.0], pa.float32()), 2)
    given = {"path": ["a"], "vector": vectors} | columns
    made = {"format": 1, "model": "m", "weights": "w", "size": 16, "folder": "f", "listing": "l"} | record
    whole = pa.table({name: column for name, column in given.items() if column is not None})
    whole = whole.replace_schema_metadata({"orchestrator.embeddings": json.dumps(made)})
    pq.write_table(whole, tmp_path / "e.parquet")
    with pytest.raises(UserError), open_embeddings(tmp_path / "e.parquet"):
        pass


def test_reasons_are_counted() -> None:
    left_out = [LeftOut(str(number), f"reason {number % 7}") for number in range(15)]
    assert by_reason(left_out, 2) == "3 × reason 0; 2 × reason 1; and 5 more reasons"
    assert by_reason(()) == ""


@pytest.mark.heavy
def test_the_command_in_a_process_of_its_own(photos: Path, model: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "orchestrator",
            "embed",
            "photos",
            "-m",
            "model",
            "-o",
            "e.parquet",
            "--loaders",
            "1",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "✓ 8 images of photos are in e.parquet" in done.stdout
    with open_embeddings(tmp_path / "e.parquet") as found:
        assert isinstance(found, Embeddings)
        assert (found.num_rows, found.dim, found.num_unreadable) == (8, 48, 4)
        assert (found.made.model, found.made.size) == (str(model), SIZE)
