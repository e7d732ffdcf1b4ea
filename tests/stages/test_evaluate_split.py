"""`evaluate` with a split: what is learned, what chooses, what is reported, and who refuses what."""

from __future__ import annotations

import gc
import hashlib
import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orchestrator.config.split import Split
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.errors import UserError
from orchestrator.evaluation.metrics.knn import knn_vote
from orchestrator.evaluation.metrics.segmentation import LinearSegmentation
from orchestrator.models import embed, load_pretrained
from orchestrator.pipeline.keys.cache_key import key_parts
from orchestrator.pipeline.load import load
from orchestrator.stages.base import Context, ImageCount, PlanContext
from orchestrator.stages.common.error_places import error_at
from orchestrator.stages.common.scores import read_scores
from orchestrator.stages.evaluate import towers
from orchestrator.stages.evaluate.config import Evaluate
from orchestrator.stages.evaluate.towers import Crops

from .evaluating import artifact, context, make_backbone, make_students

LABELS = ("red", "green", "blue")
PARTS = {"train": 6, "val": 3, "test": 4}


@pytest.fixture(autouse=True)
def one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))


def make_index(folder: Path) -> Path:
    """Photos of three colours, among others, in folders of train, val and test."""
    rng = np.random.default_rng(0)
    rows = []
    for part, count in PARTS.items():
        (folder / part).mkdir()
        for at, label in enumerate(LABELS):
            for number in range(count):
                coarse = rng.integers(0, 200, (4, 4, 3))
                coarse[..., at] += rng.integers(-20, 55)
                path = folder / part / f"{label}-{number}.png"
                Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((40, 24)).save(path)
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                name = f"{part}/{path.name}"
                rows.append(
                    ImageRecord("photos", name, str(folder), digest, 40, 24, label, label, "balanced", at)
                )
    index = folder / "index"
    index.mkdir()
    ImageIndex(rows).save(index)
    return index


@pytest.fixture
def given(tmp_path: Path) -> Context:
    index = artifact("curate", make_index(tmp_path))
    pretrain = artifact("pretrain", make_backbone(tmp_path / "pretrain", 0, (2,)))
    students = artifact("distill", make_students(tmp_path / "distill"))
    return context(tmp_path, {"index": index, "pretrain": pretrain, "students": students})


FOLDERS = {"by": "folder", "train": "train", "validation": "val", "test": "test"}


def stage(**changes: object) -> Evaluate:
    return Evaluate.model_validate({"kind": "evaluate", "num_pictures": 1, "split": FOLDERS, **changes})


def test_figures_are_of_test_photos(given: Context) -> None:
    metrics = ["knn", {"use": "linear_probe", "decay": [0.01, 1.0]}, "image_retrieval", "size_robustness"]
    summary = stage(metrics=metrics).run(given)
    table = json.loads((given.out / "table.json").read_text())
    assert table["split"] == {"train": 18, "validation": 9, "test": 12}
    rows = {row["name"]: row for row in table["knn"]["rows"]}
    assert list(rows)[:3] == ["majority group", "raw pixels", "random vit_femto"]
    assert rows["majority group"]["accuracy"] == pytest.approx(1 / 3)
    assert (table["knn"]["num_photos"], summary["photos"]) == (12, 12)

    # What a plain loop over the public API gives with the number of neighbours that was chosen.
    index = ImageIndex.load(given.inputs["index"].path)
    model = load_pretrained(given.inputs["pretrain"].path / "model")
    x = np.stack([embed(model, Image.open(index.path(row)), 16).numpy() for row in range(len(index))])
    labels = np.array([str(label) for label in index.labels])
    part = np.array([index[row].path.partition("/")[0] for row in range(len(index))])
    by_k = {
        k: {
            name: float(
                (
                    knn_vote(x[part == "train"], labels[part == "train"], x[part == name], k)
                    == labels[part == name]
                ).mean()
            )
            for name in ("val", "test")
        }
        for k in (1, 5, 10, 20, 50)
    }
    best = max(by_k, key=lambda k: by_k[k]["val"])
    row = rows["pretrain, step 2 (teacher)"]
    assert row["accuracy"] == pytest.approx(by_k[best]["test"])
    assert row["figure"]["note"].startswith(f"k={best}, validation {by_k[best]['val']:.3f}")
    assert row["figure"]["low"] <= row["accuracy"] <= row["figure"]["high"]
    assert (row["weighted"]["split"], row["weighted"]["num"]) == ("test", 12)
    assert summary["knn_teacher"] == row["accuracy"]

    probe = table["figures"]["linear_probe"]["student small"]["test_accuracy"]
    assert (probe["split"], probe["num"], probe["note"].startswith("decay=")) == ("test", 12, True)
    assert table["metrics"]["linear_probe"]["student small"] == {"test_accuracy": probe["value"]}
    assert list(table["metrics"]["linear_probe"])[:2] == ["majority group", "raw pixels"]
    assert "raw pixels" not in table["metrics"]["size_robustness"]
    assert set(table["metrics"]["size_robustness"]["student small"]) == {
        f"test_accuracy_at_{scale}x" for scale in ("0.5", "1", "2")
    }
    assert summary["linear_probe_test_accuracy_small"] == probe["value"]

    (record,) = given.run.history("eval")
    metrics_of_run = record["metrics"]
    assert metrics_of_run["linear_probe/test_accuracy/student small"] == probe["value"]
    assert metrics_of_run["linear_probe/test_accuracy/low/student small"] == probe["low"]
    assert metrics_of_run["knn_test/raw pixels"] == rows["raw pixels"]["accuracy"]
    assert metrics_of_run["knn_test/low/raw pixels"] == rows["raw pixels"]["figure"]["low"]
    assert metrics_of_run["knn/test_accuracy/raw pixels"] == rows["raw pixels"]["weighted"]["value"]
    assert "knn/raw pixels" not in metrics_of_run
    page = (given.out / "report.html").read_text()
    assert "18 train, 9 validation, 12 test" in page
    assert "test, n=12" in page
    assert "95 % bootstrap" in (given.out / "table.md").read_text()
    assert {
        "knn",
        "metric_knn",
        "metric_linear_probe",
        "metric_image_retrieval",
        "metric_size_robustness",
    } <= {path.stem for path in given.out.glob("*.png")}


def test_the_gate_reads_the_figures(given: Context) -> None:
    stage(metrics=["linear_probe", "knn"]).run(given)
    evaluation = artifact("evaluate", given.out)
    found = read_scores(evaluation, given.inputs["students"], "small")
    assert found is not None
    assert {"knn", "linear_probe", "linear_probe/test_accuracy"} <= set(found.metrics)
    assert found.num_photos == 12
    table = json.loads((given.out / "table.json").read_text())
    assert found.metrics["knn"] == next(
        row["accuracy"] for row in table["knn"]["rows"] if row["student"] == "small"
    )


def test_a_dense_metric_without_labels_in_the_index(given: Context, tmp_path: Path) -> None:
    """Segmentation has a data set of its own."""
    rng = np.random.default_rng(0)
    for at in range(9):
        mask = np.zeros((32, 32), np.uint8)
        mask[:, : rng.integers(8, 24)] = 1
        pixels = np.where(mask[..., None] == 1, (200, 60, 50), (40, 70, 190)) + rng.normal(0, 9, (32, 32, 3))
        for folder, what in (("images", pixels.clip(0, 255).astype(np.uint8)), ("masks", mask)):
            (tmp_path / "cut" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(what).save(tmp_path / "cut" / folder / f"{at}.png")
    metric = {
        "use": "linear_segmentation",
        "data": {"path": str(tmp_path / "cut")},
        "size": 32,
        "decay": [1e-3],
    }
    made = stage(metrics=[metric], split=None)
    assert len(made.files()["metrics.0.data"]) == 18
    made.check()
    made.run(given)
    found = json.loads((given.out / "table.json").read_text())["metrics"]["linear_segmentation"]
    assert list(found)[:3] == ["largest class", "raw pixels", "random vit_femto"]
    assert found["raw pixels"]["test_mean_iou"] > found["largest class"]["test_mean_iou"]
    assert set(found["student small"]) == {"test_mean_iou", "test_pixel_accuracy"}
    drawn = {path.stem for path in given.out.glob("metric_linear_segmentation_*.png")}
    assert drawn == {f"metric_linear_segmentation_{one}" for one in ("teacher", "small", "other")}
    assert 'alt="linear_segmentation, student small"' in (given.out / "report.html").read_text()


def test_a_split_by_hash_leaves_rare_labels_out(given: Context) -> None:
    stage(split={"by": "hash", "seed": 3}, num_groups=3).run(given)
    table = json.loads((given.out / "table.json").read_text())
    assert sum(table["split"].values()) == 39
    assert table["knn"]["rows"][0]["name"] == "majority group"


def test_labels_that_training_lacks(given: Context) -> None:
    index = ImageIndex.load(given.inputs["index"].path)
    rows = [index[row] for row in range(len(index))]
    ImageIndex([replace(row, label="blu") if row.path == "test/blue-0.png" else row for row in rows]).save(
        given.inputs["index"].path
    )
    with pytest.raises(UserError, match="test has 1 label that train lacks: 'blu'") as caught:
        stage().run(given)
    assert caught.value.where == "stages.evaluate.split"


def test_a_metric_that_learns_needs_a_split() -> None:
    with pytest.raises(UserError, match="linear_probe learns from some photos") as caught:
        stage(split=None, metrics=["knn", "linear_probe"]).check()
    assert caught.value.where == "metrics.1"
    stage(metrics=["knn", "linear_probe"]).check()
    stage(split=None, metrics=["knn", "image_retrieval"]).check()


def test_what_is_wrong_with_the_data_of_a_metric_is_at_its_field(tmp_path: Path) -> None:
    """And the file that it is in is told in words."""
    made = stage(metrics=["knn", {"use": "linear_segmentation", "data": {"path": str(tmp_path)}}])
    for part, name in (("images", "a.png"), ("masks", "a.png")):
        (tmp_path / part).mkdir()
        side = 32 if part == "images" else 16
        Image.fromarray(np.zeros((32, side), np.uint8)).save(tmp_path / part / name)
    with pytest.raises(UserError) as caught:
        made.check()
    assert caught.value.where == "metrics.1.data"
    assert "a.png" in caught.value.what


@pytest.mark.parametrize(
    ("error", "what", "where"),
    [
        (UserError("no", where="data.path", hint="x"), "no", "metrics.0.data.path"),
        (UserError("no", where="size"), "no", "metrics.0.size"),
        (UserError("no", where="/data/set/a.png"), "no, in /data/set/a.png", "metrics.0.data"),
        (UserError("a.png is odd", where="/data/set/a.png"), "a.png is odd", "metrics.0.data"),
        (UserError("no", where="/data/m.jsonl:7"), "no, in /data/m.jsonl:7", "metrics.0.data"),
        (UserError("no"), "no", "metrics.0.data"),
    ],
)
def test_a_place_is_a_field_or_is_told(error: UserError, what: str, where: str) -> None:
    found = error_at(error, "metrics.0", LinearSegmentation)
    assert (found.what, found.where, found.hint) == (what, where, error.hint)


def test_a_metric_of_labels_needs_labels() -> None:
    upstream = {"pretrain": stage()}
    plan = PlanContext(upstream=upstream, photos=ImageCount(photos=20))  # type: ignore[arg-type]
    found = stage(metrics=["image_retrieval"]).preflight(plan)
    assert [(error.what, error.where) for error in found] == [
        ("none of the 20 photos has a label, and image_retrieval tells labels apart", "metrics.0")
    ]


def test_a_component_that_the_index_lacks() -> None:
    made = stage(split={"by": "component", "train": "balanced", "test": "held-out"})
    with pytest.raises(UserError, match="'held-out' is not a component of the index") as caught:
        made.check_index(("balanced", "pool"), ("photos",))
    assert (caught.value.where, caught.value.hint) == ("split.test", "did you mean 'held_out'?")
    stage(split={"by": "component", "train": "balanced", "test": "held_out"}).check_index(("balanced",), ())


def test_the_split_and_the_metrics_are_in_the_key(tmp_path: Path) -> None:
    def key(made: Evaluate) -> str:
        return key_parts(made, inputs={}, data={}, seed=0).key

    plain = Evaluate.model_validate({"kind": "evaluate"})
    assert key(plain) == key(plain.model_copy(update={"split": None}))
    keys = {key(plain), key(stage()), key(stage(split=FOLDERS | {"seed": 1})), key(stage(metrics=["knn"]))}
    assert len(keys) == 4
    lists = {name: str(tmp_path / name) for name in ("train", "test")}
    assert set(stage(split={"by": "file", **lists}).files()) == {"split.train", "split.test"}
    assert isinstance(stage().split, Split)


def test_many_photos_are_not_kept(given: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    index = ImageIndex.load(given.inputs["index"].path)
    kept = Crops(index, range(len(index)), lambda: None)
    whole = np.concatenate(list(kept.batches(16, 4)))
    monkeypatch.setattr(towers, "_KEPT", 0)
    streamed = Crops(index, range(len(index)), lambda: None)
    batches = list(streamed.batches(16, 4))
    assert [len(batch) for batch in batches] == [4] * 9 + [3]
    assert (np.concatenate(batches) == whole).all()
    assert not streamed._kept


def test_features_do_not_keep_the_patches_of_their_batch(given: Context) -> None:
    model = load_pretrained(given.inputs["pretrain"].path / "model")
    seen: list[weakref.ref[torch.Tensor]] = []

    class Watched(torch.nn.Module):
        patch_size = model.patch_size

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: torch.Tensor) -> object:
            tokens = torch.randn(len(images), 5, 4)
            seen.append(weakref.ref(tokens.untyped_storage()))
            return type("Found", (), {"cls": tokens[:, 0], "patches": tokens[:, 1:]})()

    tower = towers.Tower(Watched(), "watched", 16)  # type: ignore[arg-type]
    kept: list[int] = []

    def batches() -> Iterator[np.ndarray]:
        for _ in range(4):
            yield np.zeros((2, 16, 16, 3), np.uint8)
            gc.collect()
            kept.append(sum(one() is not None for one in seen))

    assert towers.embed_crops(tower, batches(), 8, lambda: None).shape == (8, 4)
    assert kept[-1] <= 1


def test_keys_below_models_from_elsewhere_are_named_in_their_hints(tmp_path: Path) -> None:
    text = "name: x\nstages:\n  e:\n    kind: evaluate\n    needs: [c]\n    models: {tiny: {KEY: x}}\n"
    hints = {"tim": "did you mean 'timm'?", "zzz": "models.tiny takes: bands, block, cls_block, from, "}
    for key, hint in hints.items():
        (tmp_path / "p.yaml").write_text(text.replace("KEY", key))
        with pytest.raises(UserError, match=f"unknown key '{key}'") as caught:
            load(tmp_path / "p.yaml")
        assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    ("clusters", "said"),
    [
        ("0", "stages.c.clusters: must be greater than or equal to 1, not 0"),
        ("[]", "stages.c.clusters: must have at least 1 item, not []"),
        ("[9, 0]", "stages.c.clusters.1: must be greater than or equal to 1, not 0"),
        ("2.5", "stages.c.clusters: must be an integer, not 2.5"),
    ],
)
def test_a_list_with_a_wrong_item_is_not_called_short(tmp_path: Path, clusters: str, said: str) -> None:
    text = (
        f"name: x\ndata: {{d: {{path: .}}}}\nstages:\n  c: {{kind: curate, data: d, clusters: {clusters}}}\n"
    )
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load(tmp_path / "p.yaml")
    assert caught.value.what == said
