"""Evaluation of tiny towers on photos whose groups differ by colour."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file

from orchestrator.data.curation.mix import effective_number
from orchestrator.data.index import ImageIndex
from orchestrator.errors import Stopped, UserError
from orchestrator.evaluation.metric import LEAVE_ONE_OUT
from orchestrator.evaluation.metrics.knn import knn_leave_one_out
from orchestrator.models import build, embed, load_pretrained
from orchestrator.stages.base import Context
from orchestrator.stages.evaluate.config import Evaluate
from orchestrator.stages.evaluate.shown import largest_groups, pick_photos, spread

from .evaluating import (
    SIZE,
    artifact,
    context,
    drawn,
    make_backbone,
    make_students,
    make_text,
    one_thread,
    small,
    stage,
)

__all__ = ["one_thread", "small"]


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
