"""Evaluation of tiny towers on photos whose groups differ by colour."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pydantic import ValidationError
from safetensors.torch import save_file

from orchestrator.config.elastic import Elastic
from orchestrator.data.curation.mix import effective_number
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.errors import Stopped, UserError
from orchestrator.evaluation.metric import LEAVE_ONE_OUT, Figure
from orchestrator.evaluation.metrics.bootstrap import mean
from orchestrator.evaluation.metrics.knn import knn_leave_one_out
from orchestrator.models import build, embed, load_pretrained, save_pretrained
from orchestrator.models.network_spec import NetworkSpec
from orchestrator.models.wrapped_backbone import WrappedBackbone, save_wrapped
from orchestrator.stages.base import Context
from orchestrator.stages.evaluate import text as evaluate_text
from orchestrator.stages.evaluate.config import Evaluate
from orchestrator.stages.evaluate.shown import largest_groups, pick_photos, spread
from orchestrator.stages.evaluate.text import TextEvaluation
from orchestrator.storage.artifacts import Artifact
from orchestrator.storage.manifest import Manifest
from orchestrator.tracking.run import NullRun

SIZE = 16
# Photos a group; "rare" has one photo and cannot take part.
GROUPS = {"red": 6, "green": 5, "blue": 3, "rare": 1}
KEYS = {"distill": "d" * 64, "curate": "c" * 64}


def make_index(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = []
    for at, (label, count) in enumerate(GROUPS.items()):
        for number in range(count):
            pixels = rng.integers(0, 60, (24, 40, 3))
            pixels[..., at % 3] += 150
            name = f"{label}-{number}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
            rows.append(
                ImageRecord(
                    "photos", name, str(folder), "0", 40, 24, caption=f"{label} {number}", label=label,
                    component="balanced" if number < 3 else "pool", cluster=at,
                )
            )  # fmt: skip
    index = folder / "index"
    index.mkdir()
    ImageIndex(rows).save(index)
    return index


def history(steps: int, health: bool = True) -> str:
    names = {"cls_patch_cosine": 0.1, "patch_locality": 0.5} if health else {}
    return json.dumps(
        [
            {"step": step, "metrics": {"loss": 9 - step, **{name: v * step for name, v in names.items()}}}
            for step in range(steps, 0, -1)
        ]
    )


def drawn(*counts: int, left_out: float = 0.0) -> str:
    """What a stage drew of clusters, as it says so in `drawn.json`."""
    return json.dumps(
        {
            "draws": sum(counts),
            "left_out": left_out,
            "effective_clusters": effective_number(counts),
            "clusters": {str(number): count for number, count in enumerate(counts)},
        }
    )


def make_backbone(folder: Path, seed: int, steps: tuple[int, ...] = (2, 4, 6)) -> Path:
    (folder / "snapshots").mkdir(parents=True)
    for step in steps:
        torch.manual_seed(seed + step)
        state = build("vit_femto").state_dict()
        save_file(
            {f"backbone.{name}": value for name, value in state.items()},
            folder / "snapshots" / f"step-{step:08}.safetensors",
        )
    save_pretrained(folder / "model", state, "vit_femto", {"image_size": SIZE})
    (folder / "history.json").write_text(history(steps[-1]))
    (folder / "drawn.json").write_text(drawn(30, 30, 30, 10))
    return folder


def make_students(folder: Path) -> Path:
    for name in ("small", "other"):
        torch.manual_seed(len(name))
        model = build("vit_femto", dim=24)
        save_pretrained(
            folder / "students" / name / "model",
            model.state_dict(),
            "vit_femto",
            {"image_size": SIZE},
            {"dim": 24},
        )
        (folder / "students" / name / "history.json").write_text(history(3, health=False))
    (folder / "sharing.json").write_text(json.dumps({"teacher_forwards_per_image": 1.0}))
    (folder / "drawn.json").write_text(drawn(30, 30, 30, 10))
    return folder


def make_text(folder: Path, tower: Path, captions: list[str]) -> Path:
    from orchestrator.stages.align_text.captions import train_tokenizer
    from orchestrator.stages.align_text.config import AlignText, TextSettings
    from orchestrator.stages.align_text.export import save_aligned
    from orchestrator.stages.align_text.task import align_net
    from orchestrator.stages.common.text_tokenizer import load_tokenizer

    folder.mkdir()
    sizes = TextSettings(dim=16, depth=1, num_heads=2)
    config = AlignText(
        kind="align_text", steps=1, batch_size=16, output_dim=12, num_blocks=0, text=sizes, vocab_size=300
    )
    tokenizer = folder / "tokenizer.json"
    train_tokenizer(captions, config.vocab_size, config.context, tokenizer)
    torch.manual_seed(0)
    vocab_size = load_tokenizer(tokenizer).get_vocab_size()
    net = align_net(config, load_pretrained(tower).dim, vocab_size, None)
    save_file(
        {name: value.contiguous() for name, value in net.state_dict().items()}, folder / "export.safetensors"
    )
    save_aligned(folder / "export.safetensors", folder / "aligned", config, tower, tokenizer, image_size=SIZE)
    (folder / "history.json").write_text(history(2, health=False))
    (folder / "drawn.json").write_text(drawn(60, 50, 30, 10, left_out=1 / 3))
    return folder


def artifact(kind: str, path: Path) -> Artifact:
    manifest = Manifest(kind=kind, key="f" * 64, created="", files={}, provenance={}, summary={})
    return Artifact("f" * 64, kind, path, manifest)


def context(tmp_path: Path, inputs: Mapping[str, Artifact]) -> Context:
    out = tmp_path / f"out-{len(list(tmp_path.glob('out-*')))}"
    out.mkdir()
    return Context(
        name="evaluate",
        pipeline="colours",
        seed=0,
        key="k",
        inputs=inputs,
        keys=KEYS,
        sources={},
        out=out,
        work=tmp_path / "work",
        elastic=Elastic(),
        run=NullRun(),
    )


@pytest.fixture(autouse=True)
def one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small(tmp_path: Path) -> Context:
    """An index and one backbone."""
    index = artifact("curate", make_index(tmp_path))
    return context(
        tmp_path, {"index": index, "pretrain": artifact("pretrain", make_backbone(tmp_path / "pretrain", 0))}
    )


def stage(**changes: object) -> Evaluate:
    return Evaluate.model_validate({"kind": "evaluate", "k": 3, "num_pictures": 1, **changes})


def test_everything_upstream_is_scored_and_shown(small: Context, tmp_path: Path) -> None:
    index = ImageIndex.load(small.inputs["index"].path)
    students = make_students(tmp_path / "distill")
    tower = students / "students" / "small" / "model"
    text = make_text(tmp_path / "text", tower, [str(caption) for caption in index.captions])
    more = {
        "gram": artifact("gram_anchor", make_backbone(tmp_path / "gram", 10)),
        "high_res": artifact("high_res", make_backbone(tmp_path / "high_res", 20, (3,))),
        "students": artifact("distill", students),
        "text": artifact("align_text", text),
    }
    full = context(tmp_path, {**small.inputs, **more})
    summary = stage(num_pictures=4).run(full)

    table = json.loads((full.out / "table.json").read_text())
    rows = {row["name"]: row for row in table["knn"]["rows"]}
    assert list(rows) == [
        "majority group",
        "raw pixels",
        "random vit_femto",
        "pretrain, step 2",
        "pretrain, step 6",
        "gram_anchor, step 2",
        "gram_anchor, step 6",
        "high_res, step 3 (teacher)",
        "student other",
        "student small",
    ]
    assert (table["knn"]["num_photos"], table["knn"]["groups"]) == (14, {"red": 6, "green": 5, "blue": 3})
    assert rows["majority group"]["accuracy"] == pytest.approx(6 / 14)
    assert rows["raw pixels"]["accuracy"] == 1.0
    assert rows["student small"]["dim"] == 24
    assert summary["knn_small"] == rows["student small"]["accuracy"]
    assert summary["knn_teacher"] == rows["high_res, step 3 (teacher)"]["accuracy"]

    for row in rows.values():
        one = row["figure"]
        assert (one["value"], one["split"], one["num"]) == (row["accuracy"], LEAVE_ONE_OUT, 14)
        assert one["low"] <= row["accuracy"] <= one["high"]
    low, high = rows["majority group"]["figure"]["low"], rows["majority group"]["figure"]["high"]
    assert 0 < low < 6 / 14 < high < 1
    for name in ("retrieval", "zero_shot"):
        assert all(
            ends[0] <= table[name][key] <= ends[1]
            for key, ends in table[name]["intervals"].items()
            if key != "by_template"
        )
    assert len(table["retrieval"]["intervals"]) == 6
    assert f"{6 / 14:.3f} [{low:.3f}, {high:.3f}]" in (full.out / "report.html").read_text()
    assert table["retrieval"]["num_pairs"] == 15
    assert table["retrieval"]["chance_recall_at_5"] == pytest.approx(5 / 15)
    assert table["zero_shot"]["num_classes"] == 3
    assert summary["zero_shot"] == table["zero_shot"]["accuracy"]
    # Means over the last and first five of six steps, whatever their order in the file.
    assert table["dense_health"]["pretrain"]["cls_patch_cosine"] == pytest.approx({"first": 0.3, "last": 0.4})
    assert table["sharing"] == {"teacher_forwards_per_image": 1.0}
    clusters = {name: (one["effective"], one["left_out"]) for name, one in table["clusters"].items()}
    assert list(clusters) == ["raw", "chosen", "pretrain", "gram_anchor", "high_res", "distill", "align_text"]
    # 6, 5, 3 and 1 photos, of which up to 3 were chosen.
    assert clusters["raw"] == pytest.approx((effective_number([6, 5, 3, 1]), 5 / 15))
    assert clusters["chosen"] == clusters["pretrain"] == pytest.approx((effective_number([3, 3, 3, 1]), 0))
    assert clusters["align_text"] == pytest.approx((effective_number([6, 5, 3, 1]), 1 / 3))
    (record,) = full.run.history("eval")
    assert record["metrics"]["knn/raw pixels"] == 1.0
    assert record["metrics"]["clusters/chosen"] == clusters["chosen"][0]

    pictures = {"knn", "dense_health", "clusters", "losses_backbone", "losses_students", "losses_text"}
    pictures |= {"pca_teacher", "pca_small", "pca_other", "text_maps"}
    assert {path.stem for path in full.out.glob("*.png")} == pictures
    page = (full.out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(pictures)
    assert "What training drew" in page
    assert "n=14" in page
    assert "n=14" in (full.out / "table.md").read_text()
    assert "1.000 [1.000, 1.000]" in (full.out / "table.md").read_text()


class Hues:
    """Photos and texts in the space of colours: what a perfect pair of towers would do with "red" and so on.

    "not red" is green, so that a template can turn the classes round.
    """

    dim = 3
    image_size = SIZE
    names = ("red", "green", "blue")

    def embed_images(self, images: list[np.ndarray]) -> np.ndarray:
        found = np.stack([image.mean(axis=(0, 1)) for image in images]).astype(np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def embed_patches(self, images: list[np.ndarray], size: int) -> list[np.ndarray]:
        assert {image.shape for image in images} == {(size, size, 3)}
        halves = [[image[:, : size // 2], image[:, size // 2 :]] for image in images]
        return [self.embed_images(pair)[None] for pair in halves]

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        at = [(self.names.index(text.split()[-1]) + text.startswith("not")) % 3 for text in texts]
        return np.eye(3, dtype=np.float32)[at]

    def embed_names(self, names: list[str], templates: list[str] = ("{}",)) -> np.ndarray:
        return sum(self.embed_texts([item.replace("{}", name) for name in names]) for item in templates)


def test_classes_are_told_by_the_nearest_text(small: Context) -> None:
    index = ImageIndex.load(small.inputs["index"].path)
    texts = TextEvaluation(Hues(), index, batch=4, check=lambda: None)  # type: ignore[arg-type]
    groups = largest_groups(index.labels, 10)
    found = texts.zero_shot(groups, ["{}", "a photo of {}", "not {}"])
    assert found is not None
    by_template = {name: one.value for name, one in found.by_template.items()}
    assert by_template == {"{}": 1.0, "a photo of {}": 1.0, "not {}": 0.0}
    # Two of three templates are right.
    assert found.accuracy == Figure(1.0, 1.0, 1.0, "all", 14)
    assert (found.num_photos, found.num_classes, found.majority.value) == (14, 3, pytest.approx(6 / 14))
    assert found.majority == mean(
        np.array([label == "red" for label in index.labels if label in groups]), "all", 0
    )
    assert texts.zero_shot({}, ["{}"]) is None


def test_labels_are_read_once_for_all_photos(small: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    index = ImageIndex.load(small.inputs["index"].path)
    groups, labels = largest_groups(index.labels, 10), index.labels
    asked: list[int] = []
    monkeypatch.setattr(ImageIndex, "labels", property(lambda self: asked.append(0) or labels))
    texts = TextEvaluation(Hues(), index, batch=4, check=lambda: None)  # type: ignore[arg-type]
    assert texts.zero_shot(groups, ["{}"]) is not None
    assert len(asked) == 1, "each time is a list of all of them"


def test_texts_are_looked_for_in_the_photos(small: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    index = ImageIndex.load(small.inputs["index"].path)
    drawn: list[tuple[list[np.ndarray], list[str]]] = []
    monkeypatch.setattr(
        evaluate_text, "text_maps", lambda photos, maps, prompts, path: drawn.append((maps, prompts))
    )
    texts = TextEvaluation(Hues(), index, batch=4, check=lambda: None)  # type: ignore[arg-type]
    assert texts.maps([0, 6], ["green", "some red"], small.out / "maps.png")
    (maps, prompts) = drawn.pop()
    assert prompts == ["green", "some red"]
    assert [item.shape for item in maps] == [(1, 2, 2)] * 2
    assert (maps[0][..., 1] > maps[0][..., 0]).all()
    assert (maps[1][..., 0] > maps[1][..., 1]).all()
    monkeypatch.setattr(
        Hues, "embed_texts", lambda self, texts: np.eye(3, dtype=np.float32)[[0] * len(texts)]
    )
    assert texts.maps([0, 6, 0], [], small.out / "maps.png")
    assert drawn.pop()[1] == ["red 0", "green 0"]


def test_figures_are_those_of_the_public_api(small: Context) -> None:
    """k-NN on what `orchestrator.models.embed` gives for the files themselves."""
    stage().run(small)
    index = ImageIndex.load(small.inputs["index"].path)
    model = load_pretrained(small.inputs["pretrain"].path / "model")
    rows = [row for row, label in enumerate(index.labels) if label != "rare"]
    vectors = np.stack([embed(model, Image.open(index.path(row)), SIZE).numpy() for row in rows])
    expected = knn_leave_one_out(vectors, [str(index[row].label) for row in rows], 3)
    table = json.loads((small.out / "table.json").read_text())
    assert table["knn"]["rows"][-1]["accuracy"] == expected


def test_snapshots_are_scored_with_their_own_weights(small: Context) -> None:
    """The snapshot of step 2 scores what a model with its weights scores."""
    stage(num_snapshots=3).run(small)
    before = {row["name"]: row["accuracy"] for row in _rows(small)}
    folder = small.inputs["pretrain"].path / "snapshots"
    flat = {name: torch.zeros_like(value) for name, value in build("vit_femto").state_dict().items()}
    save_file(
        {f"backbone.{name}": value for name, value in flat.items()}, folder / "step-00000002.safetensors"
    )
    again = replace(small, out=small.out.parent / "again")
    again.out.mkdir()
    stage(num_snapshots=3).run(again)
    after = {row["name"]: row["accuracy"] for row in _rows(again)}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"pretrain, step 2"}


def test_same_inputs_same_files(small: Context) -> None:
    again = replace(small, out=small.out.parent / "again")
    again.out.mkdir()
    torch.manual_seed(0)
    stage().run(small)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    stage().run(again)
    assert torch.equal(torch.get_rng_state(), state)
    assert {path.name for path in again.out.iterdir()} == {path.name for path in small.out.iterdir()}
    for path in small.out.iterdir():
        assert path.read_bytes() == (again.out / path.name).read_bytes(), path.name


def test_photos_without_labels_still_give_a_report(small: Context, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="orchestrator")
    folder = small.inputs["index"].path
    index = ImageIndex.load(folder)
    ImageIndex([replace(index[row], label=None, caption=None) for row in range(len(index))]).save(folder)
    assert stage().run(small) == {"photos": 0.0}
    assert set(Evaluate.outputs) <= {path.name for path in small.out.iterdir()}
    assert not (small.out / "knn.png").exists()
    assert "no labels to vote with" in (small.out / "report.html").read_text()
    said = [record.message for record in caplog.records if record.name == "orchestrator"]
    towers = [line for line in said if " of " in line]
    assert len(towers) > 2, "a line for each tower says how far it is"
    assert f"{len(towers)} of {len(towers)}, " in towers[-1]


def test_histories_without_records_cost_only_their_curves(small: Context) -> None:
    (small.inputs["pretrain"].path / "history.json").write_text("[]")
    stage().run(small)
    assert {path.name for path in small.out.glob("*.png")} == {"knn.png", "pca_teacher.png", "clusters.png"}


def test_without_clusters_or_a_record_of_draws_there_is_no_chart_of_them(small: Context) -> None:
    (small.inputs["pretrain"].path / "drawn.json").unlink()
    stage().run(small)
    assert list(json.loads((small.out / "table.json").read_text())["clusters"]) == ["raw", "chosen"]
    assert not (small.out / "clusters.png").exists()
    (small.inputs["pretrain"].path / "drawn.json").write_text(drawn(9))
    folder = small.inputs["index"].path
    index = ImageIndex.load(folder)
    ImageIndex([replace(index[row], cluster=0) for row in range(len(index))]).save(folder)
    stage().run(small)
    assert not (small.out / "clusters.png").exists()


class Colours(torch.nn.Module):
    """A network from elsewhere: the mean colour, which tells the groups apart, on a grid of two by two."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * torch.nn.functional.adaptive_avg_pool2d(x, 2)


def test_models_from_elsewhere_are_rows(small: Context) -> None:
    models = {
        "colours": {"module": f"{__name__}:Colours", "size": 8, "mean": [0, 0, 0], "std": [1, 1, 1]},
        "early": {"from": str(small.inputs["pretrain"].path / "model"), "block": 1},
    }
    asked = stage(models=models)
    asked.check()
    assert asked.files()["models.early.from"][1].name == "model.safetensors"
    asked.run(small)
    table = json.loads((small.out / "table.json").read_text())
    rows = {row["name"]: row for row in table["knn"]["rows"]}
    own = rows["model colours"]
    assert (own["family"], own["model"], own["image_size"], own["dim"]) == (
        "from elsewhere", f"{__name__}:Colours", 8, 3
    )  # fmt: skip
    assert rows["model early"]["image_size"] == SIZE, "that of the last backbone"
    assert {"pca_model_colours.png", "pca_model_early.png"} <= {path.name for path in small.out.glob("*.png")}

    index = ImageIndex.load(small.inputs["index"].path)
    rows_of = [row for row, label in enumerate(index.labels) if label != "rare"]
    photos = [np.asarray(Image.open(index.path(row)).convert("RGB")) for row in rows_of]
    squares = [np.asarray(ImageOps.fit(Image.fromarray(p), (8, 8), Image.Resampling.BICUBIC)) for p in photos]
    means_ND = np.stack(squares).reshape(len(squares), -1, 3).mean(axis=1).astype(np.float32) / 255
    labels = [str(index.labels[row]) for row in rows_of]
    assert own["accuracy"] == pytest.approx(knn_leave_one_out(means_ND, labels=labels, k=3))


def test_without_a_backbone_models_from_elsewhere_are_evaluated(small: Context) -> None:
    alone = replace(small, inputs={"index": small.inputs["index"]})
    summary = stage(models={"colours": {"module": f"{__name__}:Colours", "size": 8}}).run(alone)
    assert "knn_teacher" not in summary
    assert {path.name for path in small.out.glob("pca*.png")} == {"pca_model_colours.png"}


def test_keys_of_evaluations_that_were_there_before_stay() -> None:
    assert not {"outside", "models"} & stage().identity().keys()
    assert stage(models={"a": {"timm": "b"}}).identity()["outside"]["a"]["timm"] == "b"
    assert stage(models={"a": {"timm": "b"}}).model_dump(mode="json")["models"]["a"]["timm"] == "b"


def test_mistakes_in_models_from_elsewhere(small: Context) -> None:
    with pytest.raises(UserError, match="has nothing called 'Colour'") as caught:
        stage(models={"a": {"module": f"{__name__}:Colour"}}).check()
    assert (caught.value.where, caught.value.hint) == ("models.a.module", f"did you mean {__name__}:Colours?")
    with pytest.raises(UserError, match="the model 'a': it gives") as caught:
        stage(models={"a": {"module": "torch.nn:Flatten", "size": 8}}).run(small)
    assert caught.value.where == "stages.evaluate.models.a"


def own_student(folder: Path) -> Path:
    """A student of a module in the place of one of ours, as `distill` leaves it."""
    students = make_students(folder)
    backbone = WrappedBackbone(NetworkSpec("module", f"{__name__}:Colours"), SIZE)
    shutil.rmtree(students / "students" / "other" / "model")
    save_wrapped(students / "students" / "other" / "model", backbone)
    return students


def test_a_student_that_is_a_users_network(small: Context, tmp_path: Path) -> None:
    """Its module is imported only if the pipeline names it, whatever the folder says."""
    inputs = {**small.inputs, "students": artifact("distill", own_student(tmp_path / "distill"))}
    with pytest.raises(UserError, match="its network is made by"):
        stage().run(replace(small, inputs=inputs))
    named = replace(context(tmp_path, inputs), modules=(f"{__name__}:Colours",))
    stage().run(named)
    rows = {row["name"]: row for row in json.loads((named.out / "table.json").read_text())["knn"]["rows"]}
    assert rows["student other"]["dim"] == 3
    assert rows[f"random {__name__}:Colours"]["accuracy"] == rows["student other"]["accuracy"]


def test_mistakes_are_named(small: Context) -> None:
    without = replace(small, inputs={"index": small.inputs["index"]})
    with pytest.raises(UserError, match="no backbone to evaluate"):
        stage().run(without)
    with pytest.raises(UserError, match="does not divide 20 pixels") as raised:
        stage(image_size=20).run(small)
    assert (raised.value.where, raised.value.hint) == (
        "stages.evaluate.image_size",
        "use 16, or leave it out",
    )
    index = ImageIndex.load(small.inputs["index"].path)
    index.path(2).unlink()
    with pytest.raises(UserError, match="cannot be read any more") as raised:
        stage().run(small)
    assert raised.value.where == str(index.path(2))


def test_stop_is_heeded(small: Context) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        stage().run(replace(small, stop=stop))


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": 0},
        {"num_groups": 1},
        {"image_size": 0},
        {"neighbours": 5},
        {"templates": ["a photo"]},
        {"templates": []},
    ],
)
def test_wrong_configs_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        stage(**wrong)


def test_largest_groups_and_the_photos_to_show() -> None:
    labels = ["b", "a", None, "b", "c", "a", "d", "c", "c"]
    assert largest_groups(labels, 10) == {"c": 3, "a": 2, "b": 2}
    assert list(largest_groups(labels, 2)) == ["c", "a"]
    assert largest_groups(["a", "a", "b"], 10) == {}
    assert pick_photos(labels, largest_groups(labels, 2), 2) == [4, 1]
    shown = pick_photos(labels, {}, 4)
    assert len(set(shown)) == 4
    assert pick_photos(["a", None], {}, 6) == [0, 1]


def test_spread_keeps_the_last() -> None:
    assert spread(range(10), 3) == [2, 5, 9]
    assert spread([1, 2], 5) == [1, 2]
    assert spread([], 3) == []


def test_planning_with_the_stages_loads_nothing_heavy() -> None:
    code = (
        "import sys, orchestrator.stages.evaluate.config, orchestrator.stages.publish.config\n"
        "assert not {'torch', 'ray', 'mlflow', 'matplotlib', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])


def _rows(context: Context) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads((context.out / "table.json").read_text())["knn"]["rows"]
    return rows


METRIC = """
import orchestrator

class Shapes(orchestrator.Metric):
    def measure(self, features):
        count, width = features.cls_ND.shape
        _, patches, same = features.patches().shape
        named = sum(label is not None for label in features.labels)
        assert same == width and len(features.photos) == count
        return {"photos": count, "patches": patches, "labels": named}

class Word(orchestrator.Metric):
    def measure(self, features): return "good"
"""


@pytest.fixture
def own_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The module of two metrics, each of them one file away from a pipeline."""
    (tmp_path / "own_metric.py").write_text(METRIC)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_metric", raising=False)
    return "own_metric"


@pytest.mark.parametrize("with_labels", [True, False])
def test_a_metric_of_a_file_stands_in_results_and_report(
    small: Context, own_metric: str, with_labels: bool
) -> None:
    folder = small.inputs["index"].path
    if not with_labels:
        index = ImageIndex.load(folder)
        ImageIndex([replace(index[row], label=None) for row in range(len(index))]).save(folder)
    summary = stage(metrics=[{"use": f"{own_metric}:Shapes", "name": "shapes"}]).run(small)
    photos = 14 if with_labels else 15
    expected = {"photos": photos, "patches": (SIZE // 8) ** 2, "labels": photos if with_labels else 0}
    table = json.loads((small.out / "table.json").read_text())["metrics"]
    assert set(table) == {"shapes"}
    assert {"random vit_femto", "pretrain, step 6 (teacher)"} < set(table["shapes"])
    assert all(found == expected for found in table["shapes"].values())
    assert {name: summary[f"shapes_{name}_teacher"] for name in expected} == expected
    assert "<h2>shapes</h2>" in (small.out / "report.html").read_text().replace(' id="shapes"', "")
    assert "## shapes" in (small.out / "table.md").read_text()


def test_a_metric_that_gives_no_figures_is_told(small: Context, own_metric: str) -> None:
    with pytest.raises(
        TypeError, match=r"own_metric:Word.measure gave str, not a mapping of names to numbers"
    ):
        stage(metrics=[f"{own_metric}:Word"]).run(small)


def elsewhere(kind: str, path: Path) -> Artifact:
    """Students whose teachers no stage made, as the driver records it."""
    found = artifact(kind, path)
    parts = {"parts": {"inputs": {"index": "f" * 64}}}
    return replace(found, manifest=found.manifest.model_copy(update={"provenance": parts}))


def test_students_alone_are_scored_and_shown(small: Context, tmp_path: Path) -> None:
    students = elsewhere("distill", make_students(tmp_path / "distill"))
    alone = context(tmp_path, {"index": small.inputs["index"], "students": students})
    summary = stage().run(alone)
    table = json.loads((alone.out / "table.json").read_text())
    assert [row["name"] for row in table["knn"]["rows"]] == [
        "majority group", "raw pixels", "random vit_femto", "student other", "student small",
    ]  # fmt: skip
    assert "knn_small" in summary
    assert "knn_teacher" not in summary
    assert all((alone.out / name).is_file() for name in Evaluate.outputs)
    assert table["dense_health"] == {}
    said = (alone.out / "report.html").read_text()
    assert "Dense health" not in said
    assert {path.stem for path in alone.out.glob("pca_*.png")} == {"pca_other", "pca_small"}


def test_a_backbone_that_taught_nobody_is_not_called_the_teacher(small: Context, tmp_path: Path) -> None:
    students = elsewhere("distill", make_students(tmp_path / "distill"))
    beside = context(tmp_path, {**small.inputs, "students": students})
    summary = stage(num_snapshots=1).run(beside)
    names = [row["name"] for row in json.loads((beside.out / "table.json").read_text())["knn"]["rows"]]
    assert names[3:] == ["pretrain, step 6", "student other", "student small"]
    assert "knn_teacher" not in summary
    assert all((beside.out / name).is_file() for name in Evaluate.outputs)
    assert {path.stem for path in beside.out.glob("pca_*.png")} == {"pca_pretrain", "pca_other", "pca_small"}
