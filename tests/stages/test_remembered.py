"""Features of models are computed once: a second evaluation reads them, and a change of model or picture is seen."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from orchestrator.models import Backbone, build, normalise
from orchestrator.models.detr import DetectionHead, detections
from orchestrator.stages.base import Context
from orchestrator.stages.common.predictor import Predictor
from orchestrator.stages.evaluate import remembered
from orchestrator.stages.evaluate.remembered import FeatureMemory, model_key
from orchestrator.stages.evaluate.towers import Tower, embed_crops, feature_maps, found_boxes, remembering

from .evaluating import small, stage
from .test_evaluate_outside import Colours

__all__ = ["small"]

SIDE = 16


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/features"


@pytest.fixture
def forwards() -> Iterator[list[int]]:
    """The images of each forward pass of a backbone."""
    passes: list[int] = []

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, Backbone):
            passes.append(len(inputs[0]))

    hook = nn.modules.module.register_module_forward_hook(count)
    yield passes
    hook.remove()


def again(context: Context, name: str) -> Context:
    found = replace(context, out=context.out.parent / name)
    found.out.mkdir()
    return found


def tower(seed: int = 0) -> Tower:
    torch.manual_seed(seed)
    return Tower(build("vit_femto").eval(), "vit_femto", SIDE)


def crops(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def nothing() -> None:
    pass


def test_a_second_evaluation_embeds_nothing(small: Context, forwards: list[int], cache: Path) -> None:
    first = again(small, "first")
    stage(kept_features=0).run(again(small, "plain"))
    assert not cache.exists()
    plain, forwards[:] = list(forwards), []
    stage().run(first)
    assert sum(forwards) == sum(plain) > 30
    forwards.clear()
    second = again(small, "second")
    stage(k=5).run(second)
    assert forwards == []
    third = again(small, "third")
    stage().run(third)
    assert forwards == []
    for path in (first.out.parent / "plain").iterdir():
        assert (
            path.read_bytes() == (first.out / path.name).read_bytes() == (third.out / path.name).read_bytes()
        )


def test_only_what_is_new_is_computed(forwards: list[int]) -> None:
    known, more = crops(6), crops(4, seed=1)
    first = remembering(tower(), 1.0)
    assert first.memory is not None
    plain = embed_crops(tower(), [known], len(known), nothing)
    forwards.clear()
    np.testing.assert_array_equal(embed_crops(first, [known], len(known), nothing), plain)
    np.testing.assert_array_equal(embed_crops(first, [known[:2]], len(known[:2]), nothing), plain[:2])
    maps = feature_maps(first, known)
    first.memory.flush()
    assert forwards == [6, 6], "CLS and patches are kept apart"
    later = remembering(tower(), 1.0)
    mixed = np.concatenate([known[3:], more, known[:1]])
    found = embed_crops(later, [mixed], len(mixed), nothing)
    assert forwards == [6, 6, 4]
    np.testing.assert_array_equal(found[[0, 1, 2, 7]], plain[[3, 4, 5, 0]])
    np.testing.assert_allclose(
        found[3:7], embed_crops(tower(), [more], len(more), nothing), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(feature_maps(later, known), maps)


def test_what_decides_features_decides_the_key() -> None:
    one = tower()
    assert model_key(one) == model_key(tower())
    assert model_key(one) != model_key(tower(1))
    other = tower()
    other.model.norm.weight.data[0] += 1e-6
    assert model_key(one) != model_key(other)
    assert model_key(one) != model_key(replace(one, preset="another"))
    own = replace(one, model=Colours())  # type: ignore[arg-type]
    assert model_key(own) is None, "the code of this test may change"
    assert remembering(own, 1.0) is own
    assert remembering(one, 0) is one


def test_room_is_made_by_those_that_were_not_asked_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "_CHUNK", 1)
    row = np.ones((1, 250), np.float32)

    def fill(key: str, limit: int, count: int = 4) -> FeatureMemory:
        memory = FeatureMemory.opened(key, limit)
        for at in range(count):
            memory.through("cls", crops(1, seed=at), lambda _: row)
        memory.flush()
        return memory

    for at, key in enumerate(("a", "b")):
        fill(key, 12_000)
        os.utime(cache / key, (at, at))
    assert {path.name for path in cache.iterdir()} == {"a", "b"}
    fill("c", 12_000)
    assert {path.name for path in cache.iterdir()} == {"b", "c"}
    full = fill("c", 8_000, count=8)
    assert len(list(cache.rglob("values.npy"))) == 6, "four were known, two fit beside them"
    assert full.through("cls", crops(1, seed=0), lambda _: pytest.fail("it is known")).shape == (1, 250)


@pytest.mark.parametrize(
    ("record", "is_known"),
    [
        ('{"url": "file:///a", "dir_info": {"editable": true}}', False),
        ('{"url":"file:///a","dir_info":{"editable":true}}', False),
        ('{"url": "file:///a", "dir_info": {}}', True),
        ("{", False),
        (None, True),
    ],
)
def test_code_that_may_be_edited_is_not_known(
    monkeypatch: pytest.MonkeyPatch, record: str | None, is_known: bool
) -> None:
    class About:
        version = "1"

        def read_text(self, name: str) -> str | None:
            return record

    monkeypatch.setattr(remembered, "packages_distributions", lambda: {"their": ["their-package"]})
    monkeypatch.setattr(remembered, "distribution", lambda name: About())
    assert (remembered._versions({"their", "torch"}) is not None) == is_known


def test_code_that_gives_pixels_to_models_is_part_of_the_key() -> None:
    names = {path.name for path in remembered._code_files()}
    assert {"vit.py", "pixels.py", "open_network.py", "towers.py"} <= names


@pytest.mark.parametrize("lost", [4, None])
def test_a_damaged_chunk_is_computed_again(cache: Path, forwards: list[int], lost: int | None) -> None:
    first = remembering(tower(), 1.0)
    assert first.memory is not None
    plain = embed_crops(first, [crops(3)], 3, nothing)
    first.memory.flush()
    (values,) = cache.rglob("values.npy")
    # A machine that lost its power may leave an empty file.
    values.write_bytes(values.read_bytes()[:-lost] if lost else b"")
    forwards.clear()
    np.testing.assert_array_equal(embed_crops(remembering(tower(), 1.0), [crops(3)], 3, nothing), plain)
    assert forwards == [3]


def test_the_setting_is_no_part_of_the_key() -> None:
    assert stage(kept_features=0).identity() == stage().identity()
    assert "kept_features" not in json.dumps(stage().identity())


def test_boxes_are_found_with_and_without_memory(forwards: list[int]) -> None:
    plain = tower()
    torch.manual_seed(2)
    head = DetectionHead(plain.model.dim, 2, num_queries=5, width=16, num_layers=1).eval()
    found = replace(plain, predictor=Predictor(head, "detection", ("a", "b")))
    boxes = found_boxes(found, crops(3))
    with torch.inference_mode():
        images = torch.from_numpy(crops(3).transpose(0, 3, 1, 2).copy())
        rows = head(plain.model(normalise(images, plain.model)), (SIDE, SIDE))[:, -1]
    for (corners, scores, places), row in zip(boxes, rows, strict=True):
        for ours, theirs in zip((corners, scores, places), detections(row, 2), strict=True):
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-6)
    known = remembering(found, 1.0)
    found_boxes(known, crops(3))
    forwards.clear()
    for ours, theirs in zip(found_boxes(known, crops(3)), boxes, strict=True):
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert forwards == []


def test_a_folder_that_another_evaluation_removes_meanwhile_is_made_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between being made and being marked as asked for, and later, before what is new is written."""
    touch, row = os.utime, np.ones((1, 8), np.float32)
    gone: list[Any] = []

    def utime(path: Path) -> None:
        if not gone:
            gone.append(path)
            shutil.rmtree(path)
        touch(path)

    monkeypatch.setattr(os, "utime", utime)
    memory = FeatureMemory.opened("a", 12_000)
    assert gone == [cache / "a"]
    shutil.rmtree(cache / "a")
    memory.through("cls", crops(1), lambda _: row)
    memory.flush()
    again = FeatureMemory.opened("a", 12_000)
    np.testing.assert_array_equal(again.through("cls", crops(1), lambda _: pytest.fail("it is known")), row)


def test_models_that_go_while_room_is_made_take_none(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b", "c"):
        (cache / name).mkdir(parents=True)
        (cache / name / "values.npy").write_bytes(bytes(6_000))
    size = remembered._bytes_in

    def another(folder: Path) -> int:
        shutil.rmtree(cache / "b", ignore_errors=True)
        return size(folder)

    monkeypatch.setattr(remembered, "_bytes_in", another)
    memory = FeatureMemory.opened("a", 12_000)
    assert memory._room in (6_000, 12_000), "b has gone, and c may have before it was counted"
    assert memory._room == 12_000 - sum(path.stat().st_size for path in cache.rglob("*.npy"))


def test_a_chunk_finds_what_a_dictionary_finds() -> None:
    random = np.random.default_rng(0)
    # Some end in zeros, which NumPy takes for the end of a text.
    raw = random.integers(0, 256, (300, 20), dtype=np.uint8)
    raw[::3, 17:] = 0
    raw[5] = 0
    digests = [row.tobytes() for row in raw]
    names = np.array(digests[:200], dtype="S20")
    order = np.argsort(names)
    chunk = remembered._Chunk(names[order], order.astype(np.int32), np.zeros((200, 1), np.float32))
    known = {digest: row for row, digest in enumerate(digests[:200])}
    found = chunk.find(np.array(digests, dtype="S20"))
    assert found.tolist() == [known.get(digest, -1) for digest in digests]
    empty = remembered._Chunk(names[:0], order[:0].astype(np.int32), np.zeros((0, 1), np.float32))
    assert empty.find(names[:2]).tolist() == [-1, -1]


def test_only_a_few_rows_wait_in_memory(forwards: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "_ROWS", 4)
    first = remembering(tower(), 1.0)
    assert first.memory is not None
    plain = embed_crops(tower(), [crops(11)], 11, nothing)
    forwards.clear()
    for start in (0, 3, 6, 9):
        embed_crops(first, [crops(11)[start : start + 3]], min(3, 11 - start), nothing)
        assert len(first.memory._unwritten) < 4
    np.testing.assert_allclose(embed_crops(first, [crops(11)], 11, nothing), plain, rtol=1e-5, atol=1e-6)
    assert sum(forwards) == 11
