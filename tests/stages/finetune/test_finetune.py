"""`finetune`: its labels and mistakes, what is computed, and what its model is to others."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    jaccard_score,
    log_loss,
    mean_squared_error,
)
from torch import nn
from transformers import Dinov2Config, Dinov2Model

import orchestrator
from orchestrator.config.elastic import Elastic
from orchestrator.config.schedules import Optimizer
from orchestrator.data.index import ImageIndex, ImageRecord
from orchestrator.errors import UserError
from orchestrator.evaluation.metrics.segmentation import iou_parts, mean_iou
from orchestrator.models import (
    build,
    efficientnet,
    layer_depths,
    load_pretrained,
    normalise,
    preprocess,
    save_pretrained,
)
from orchestrator.models.cost import forward_flops
from orchestrator.models.predictors import head_of
from orchestrator.models.wrapped_backbone import WrappedBackbone
from orchestrator.pipeline.dag import graph_errors
from orchestrator.pipeline.load import load
from orchestrator.stages.base import Context, ImageCount, PlanContext
from orchestrator.stages.common.mlmodel import mlmodel, width
from orchestrator.stages.common.predictor import Predictor
from orchestrator.stages.compute_cost import workloads
from orchestrator.stages.evaluate.config import Evaluate
from orchestrator.stages.finetune.class_goal import ClassGoal
from orchestrator.stages.finetune.config import Finetune
from orchestrator.stages.finetune.dense_goals import DepthGoal, SegmentationGoal
from orchestrator.stages.finetune.export import save_finetuned
from orchestrator.stages.finetune.pictures import indexed
from orchestrator.stages.finetune.start import StartingBackbone, starting_backbone
from orchestrator.stages.finetune.task import FinetuneTask, TunedNet, block_depths, learning_rates
from orchestrator.stages.publish.config import Publish
from orchestrator.stages.ssl.pretrain import Pretrain
from orchestrator.storage.artifacts import Artifact, Manifest
from orchestrator.tracking import download
from orchestrator.tracking.run import NullRun, Tracking

from .registries import artifact
from .registries import context as registry_context

ROOT = Path(__file__).parents[2]
LABELS = ("cat", "dog", "owl")


def config(**overrides: Any) -> Finetune:
    fields: dict[str, Any] = {
        "kind": "finetune", "task": "classification", "steps": 4, "batch_size": 8, "block_size": 4,
        "optimizer": {"lr": {"peak": 1e-3}},
    }  # fmt: skip
    return Finetune.model_validate({**fields, **overrides})


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """24 pictures in folders by label; the table says the labels too."""
    rng, rows = np.random.default_rng(0), []
    for number in range(24):
        label = LABELS[number % 3]
        (tmp_path / "photos" / label).mkdir(parents=True, exist_ok=True)
        path = f"{label}/{number}.png"
        cv2.imwrite(str(tmp_path / "photos" / path), rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
        rows.append(
            ImageRecord("photos", path, str(tmp_path / "photos"), f"{number:064x}", 24, 20, label=label)
        )
    (tmp_path / "index").mkdir()
    ImageIndex(rows).save(tmp_path / "index")
    return tmp_path / "index"


@pytest.fixture
def start(tmp_path: Path) -> StartingBackbone:
    torch.manual_seed(1)
    save_pretrained(tmp_path / "start", build("vit_femto").state_dict(), "vit_femto", {"image_size": 16})
    return StartingBackbone(tmp_path / "start", 16)


def context(index: Path, folder: Path, **inputs: Path) -> Context:
    def artifact(path: Path) -> Artifact:
        manifest = Manifest(kind="x", key="1" * 64, created="", files={}, provenance={}, summary={})
        return Artifact("1" * 64, "x", path, manifest)

    return Context(
        name="tune", pipeline="test", seed=0, key="0" * 64, sources={}, keys={}, run=NullRun(),
        inputs={"index": artifact(index), **{role: artifact(path) for role, path in inputs.items()}},
        out=folder / "out", work=folder / "work", elastic=Elastic(device="cpu"),
    )  # fmt: skip


def labelled(stage: Finetune, index: Path, tmp_path: Path) -> Any:
    return stage.labelled(context(index, tmp_path), ImageIndex.load(index))


def relabelled(index: Path, **changes: Any) -> Path:
    """The index with a function of row and record in the place of each record's fields."""
    found = ImageIndex.load(index)
    ImageIndex(
        [
            replace(found[row], **{name: change(row, found[row]) for name, change in changes.items()})
            for row in range(len(found))
        ]
    ).save(index)
    return index


# --- what is computed -------------------------------------------------------------------------------------------


def test_figures_are_those_of_scikit_learn_over_any_blocks() -> None:
    rng = np.random.default_rng(3)
    logits, classes = rng.normal(0, 2, (14, 4)), rng.integers(0, 3, 14)  # one class is not there
    weights = np.ones(14, np.float32)
    weights[[4, 13]] = 0  # padding
    goal, sums = ClassGoal(4, "cls", 0.0), torch.zeros(9, dtype=torch.float64)
    for rows in (slice(0, 5), slice(5, 14)):
        tensors = {"classes": torch.from_numpy(classes[rows]), "weights": torch.from_numpy(weights[rows])}
        sums = sums + goal.sums(torch.from_numpy(logits[rows]), tensors)
    real = weights > 0
    figures = goal.figures(sums)
    said = logits[real].argmax(axis=1)
    probabilities = np.exp(logits[real]) / np.exp(logits[real]).sum(axis=1, keepdims=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where a class is said that is not there
        balanced = balanced_accuracy_score(classes[real], said)
    assert figures == pytest.approx(
        {
            "accuracy": accuracy_score(classes[real], said),
            "mean_class_accuracy": balanced,
            "cross_entropy": log_loss(classes[real], probabilities, labels=range(4)),
        }
    )


def test_layers_further_from_the_output_learn_more_slowly() -> None:
    optimizer = Optimizer.model_validate({"lr": {"peak": 1e-3}, "layer_decay": 0.5, "patch_embed_scale": 0.2})
    net = TunedNet(torch.nn.Linear(2, 2), build("vit_femto"))
    rates = learning_rates(net, optimizer)
    assert rates["backbone.norm.weight"] == 1
    assert rates["backbone.blocks.1.norm1.weight"] == 0.5
    assert rates["backbone.blocks.0.ffn.up.weight"] == 0.25
    assert rates["backbone.cls_token"] == 0.125
    assert rates["backbone.patch_embed.weight"] == pytest.approx(0.125 * 0.2)
    assert not any(name.startswith("head.") for name in rates), "the head learns at the full rate"

    names = [name for name, _ in Dinov2Model(tiny_dinov2()).named_parameters()]
    depths = block_depths(names)
    assert depths["embeddings.cls_token"] == depths["embeddings.patch_embeddings.projection.weight"] == 0
    assert {depths[name] for name in names if ".layer.0." in name} == {1}
    assert {depths[name] for name in names if ".layer.1." in name} == {2}
    assert depths["layernorm.weight"] == 3
    # Of ours it is what the towers say themselves.
    tower = build("vit_femto")
    ours = {name: depth for name, depth in layer_depths(tower).items() if name.startswith("blocks.")}
    assert {name: block_depths(dict(tower.named_parameters()))[name] for name in ours} == ours


class Stack(WrappedBackbone):
    """A network from elsewhere by the names of its parameters alone."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.stem = torch.nn.Linear(1, 1, bias=False)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(1, 1, bias=False) for _ in range(2))
        self.norm = torch.nn.LayerNorm(1, bias=False)


def test_layers_of_a_network_from_elsewhere_do_so_too() -> None:
    optimizer = Optimizer.model_validate({"lr": {"peak": 1e-3}, "layer_decay": 0.5})
    assert learning_rates(TunedNet(torch.nn.Linear(1, 1), Stack()), optimizer) == {
        "backbone.stem.weight": 0.125,
        "backbone.blocks.0.weight": 0.25,
        "backbone.blocks.1.weight": 0.5,
        "backbone.norm.weight": 1.0,
    }


def tiny_dinov2() -> Dinov2Config:
    return Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, patch_size=4, image_size=16
    )


def test_a_frozen_backbone_is_not_among_what_is_trained(start: StartingBackbone) -> None:
    for mode, parts in (("frozen", {"head"}), ("lora", {"head", "backbone"}), ("full", {"head", "backbone"})):
        task = FinetuneTask(config(mode=mode), start, LABELS, 0)
        modules = task.build("cpu")
        trained = {name for name, param in modules.trainable.named_parameters() if param.requires_grad}
        assert {name.split(".")[0] for name in trained} == parts
        assert ("backbone" in modules.frozen) == (mode == "frozen")
        if mode == "full":
            idle = {"backbone.mask_token"}
            assert trained == {name for name, _ in modules.trainable.named_parameters()} - idle
            assert modules.lr_scales.keys() >= {name for name in trained if name.startswith("backbone.")}


# --- labels -----------------------------------------------------------------------------------------------------


def test_labels_come_from_the_table_or_from_folders(index: Path, tmp_path: Path) -> None:
    split = {"near_duplicate": 1.0}
    by_table = labelled(config(split=split), index, tmp_path)
    assert by_table.classes == LABELS
    rows = np.concatenate([by_table.train, by_table.validation, by_table.test])
    assert sorted(rows.tolist()) == list(range(24))
    without = relabelled(index, label=lambda row, record: None)
    stage = config(task={"type": "classification", "labels": "folder"}, split=split)
    by_folder = labelled(stage, without, tmp_path)
    assert by_folder.classes == LABELS
    np.testing.assert_array_equal(by_folder.train, by_table.train)
    classes = stage.task.annotations(ImageIndex.load(without), LABELS)
    found = [int(classes.arrays(row, (1, 1), None, 1)["classes"]) for row in range(24)]  # type: ignore[arg-type]
    assert found == [row % 3 for row in range(24)]


def test_classes_may_be_chosen(index: Path, tmp_path: Path) -> None:
    split = {"near_duplicate": 1.0}
    few = relabelled(index, label=lambda row, record: "rare" if row in (0, 3) else record.label)
    found = labelled(config(task={"type": "classification", "classes": 2}, split=split), few, tmp_path)
    assert found.classes == ("dog", "owl"), "the most frequent ones"
    labels = {ImageIndex.load(few)[int(row)].label for row in (*found.train, *found.validation, *found.test)}
    assert labels == {"dog", "owl"}
    with pytest.raises(UserError, match=r"no image has the label 'dgo'[\s\S]*did you mean 'dog'"):
        labelled(
            config(task={"type": "classification", "classes": ["cat", "dgo"]}, split=split), few, tmp_path
        )
    with pytest.raises(UserError, match="there are 4 labels, and the 9 most frequent are asked for"):
        labelled(config(task={"type": "classification", "classes": 9}, split=split), few, tmp_path)
    with pytest.raises(UserError, match="there is only one class, 'cat'"):
        labelled(config(task={"type": "classification", "classes": ["cat"]}, split=split), few, tmp_path)


def test_one_class_only_and_labels_that_training_lacks_are_mistakes(index: Path, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    split: dict[str, Any] = {"by": "file", "near_duplicate": 1.0}
    paths = [ImageIndex.load(index)[row].path for row in range(24)]
    for name, rows in (("train", range(12)), ("validation", range(12, 18)), ("test", range(18, 24))):
        (tmp_path / "lists" / name).write_text("\n".join(paths[row] for row in rows))
        split[name] = str(tmp_path / "lists" / name)
    new = relabelled(index, label=lambda row, record: "elk" if row == 20 else record.label)
    with pytest.raises(UserError, match="test has 1 label that train lacks: 'elk'"):
        labelled(config(split=split), new, tmp_path)
    one = relabelled(index, label=lambda row, record: "cat")
    with pytest.raises(UserError, match="only one label, 'cat'"):
        labelled(config(split=split), one, tmp_path)
    lone = relabelled(index, label=lambda row, record: "dog" if row >= 12 else "cat")
    with pytest.raises(UserError, match="no training image has the label 'dog'"):
        labelled(config(task={"type": "classification", "classes": 2}, split=split), lone, tmp_path)


def test_splits_that_share_a_picture_are_a_mistake(index: Path, tmp_path: Path) -> None:
    split = {
        "by": "folder",
        "train": ["cat", "dog"],
        "test": "owl",
        "validation_share": 0.3,
        "near_duplicate": 1.0,
    }
    same = relabelled(index, sha256=lambda row, record: "7" * 64 if row in (0, 2) else record.sha256)
    with pytest.raises(UserError, match="with the same picture"):
        labelled(config(split=split), same, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"mode": "full", "lora": {"rank": 4}}, "`lora` is set, but the mode is full"),
        ({"drop_path": 0.1}, "a frozen backbone has no drop-path"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale is 0.9 to 0.5"),
        ({"batch_size": 9}, "batch_size 9 is not a multiple of block_size 4"),
        ({"task": "clasification"}, "classification"),
        ({"network": {"transformers": "x", "block": 3}}, "a network is trained up to its last block"),
        ({"from": "a", "network": {"transformers": "x"}}, "both are given"),
        ({"task": {"type": "classification", "classes": 1}}, "greater than or equal to 2"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(overrides: dict[str, Any], said: str) -> None:
    with pytest.raises((ValidationError, UserError), match=said):
        config(**overrides)


def test_what_is_known_before_the_first_step() -> None:
    pretrain = Pretrain.model_validate(
        {
            "kind": "pretrain",
            "model": "vit_femto",
            "steps": 1,
            "batch_size": 16,
            "optimizer": {"lr": {"peak": 1}},
        }
    )

    def said(stage: Finetune, labels: int = 5, **upstream: Any) -> list[str]:
        around = {**upstream, **({"origin": pretrain} if upstream else {})}
        found = stage.preflight(PlanContext(around, photos=ImageCount(9, 0, labels)))
        return [f"{error.where}: {error.what}" for error in found]

    assert said(config(), backbone=pretrain) == []
    assert said(config()) == ["needs: there is no trained backbone to start from"]
    assert said(config(network={"transformers": "x"}), backbone=pretrain)[0].startswith(
        "network: the backbone"
    )
    assert said(config(image_size=30), backbone=pretrain) == [
        "image_size: image_size 30 is not a multiple of the backbone's patch size 8"
    ]
    assert said(config(student="small"), backbone=pretrain)[0].startswith(
        "student: there is no student 'small'"
    )
    assert said(config(), 0, backbone=pretrain) == ["task: none of the 9 images has a label to learn"]
    assert said(config(task={"type": "classification", "labels": "folder"}), 0, backbone=pretrain) == []


def test_costs_count_what_a_mode_trains() -> None:
    pretrain = Pretrain.model_validate(
        {
            "kind": "pretrain",
            "model": "vit_femto",
            "steps": 1,
            "batch_size": 16,
            "optimizer": {"lr": {"peak": 1}},
        }
    )
    upstream = {"backbone": pretrain, "origin": pretrain}
    forward = forward_flops(pretrain.model_recipe().tower, 64, 64)  # type: ignore[union-attr]
    for mode, passes in (("frozen", 1), ("lora", 2), ("full", 3)):
        (work,) = workloads(config(mode=mode, image_size=64), "tune", upstream)
        assert work.flops["backbone"] == passes * forward
        kept = {net.name: net.kept for net in work.nets}
        assert kept == {"backbone": "trained" if mode == "full" else "frozen", "head": "trained"}
    assert workloads(config(network={"transformers": "x"}), "tune", {}) == []


# --- what it starts from, and what it leaves --------------------------------------------------------------------


def exported(stage: Finetune, start: StartingBackbone, path: Path) -> Path:
    """What a job would export: trained weights that differ from those at the start."""
    torch.manual_seed(5)
    task = FinetuneTask(stage, start, LABELS, 0)
    net = task.build("cpu").trainable
    state = {
        name: param.detach() + 0.05 * torch.randn_like(param)
        for name, param in net.named_parameters()
        if param.requires_grad
    }
    net.load_state_dict(state, strict=False)
    save_file(state, path)
    return path


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_the_model_of_a_folder_is_the_trained_one(mode: str, start: StartingBackbone, tmp_path: Path) -> None:
    stage = config(mode=mode)
    file = exported(stage, start, tmp_path / "export.safetensors")
    sizes = save_finetuned(stage, start, LABELS, file, tmp_path / "model")
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)

    task = FinetuneTask(stage, start, LABELS, 0)
    net = task.build("cpu").trainable
    state = load_file(file)
    net.load_state_dict(state, strict=False)
    net.eval()
    backbone = task.modules.frozen.get("backbone", net.backbone)
    assert backbone is not None
    with torch.no_grad():
        features = backbone.eval()(preprocess(picture, 16))
        logits = net.head(features)

    model = orchestrator.load(tmp_path / "model")
    assert model.image_size == 16
    assert model.classes == LABELS
    seen = model.features(picture)
    np.testing.assert_allclose(seen.cls, features.cls.numpy(), rtol=1e-4, atol=1e-5)
    found = model.predict(picture)
    np.testing.assert_allclose(found.probabilities, logits.softmax(dim=-1).numpy(), rtol=1e-3, atol=1e-5)
    assert found.labels == [LABELS[int(logits.argmax())]]
    assert found.classes == LABELS
    assert sizes["trained_parameters"] == sum(value.numel() for value in state.values())
    unchanged = load_pretrained(start.folder).state_dict()
    same = {name for name, value in load_pretrained(tmp_path / "model").state_dict().items()
            if torch.equal(value, unchanged[name])}  # fmt: skip
    if mode == "frozen":
        assert same == set(unchanged)
    elif mode == "lora":
        assert set(unchanged) - same == {
            f"blocks.{b}.attention.{n}.weight" for b in (0, 1) for n in ("qkv", "proj")
        }
    else:
        assert same == {"mask_token"}
    # What MLflow serves, and what says how wide its vectors are.
    assert width(tmp_path / "model") == 48
    assert "image" in mlmodel(tmp_path / "model")
    assert orchestrator.embed(model, [picture]).shape == (1, 48)


def test_a_model_without_a_head_says_so(start: StartingBackbone) -> None:
    with pytest.raises(UserError, match="has no classes"):
        orchestrator.load(start.folder).predict([np.zeros((16, 16, 3), np.uint8)])


@pytest.mark.parametrize("least", ["0.5", float("nan"), -0.1, 1.5, True, None])
def test_a_score_that_is_none_is_a_mistake(least: Any, start: StartingBackbone) -> None:
    """With nan nothing would be found, and nobody told why."""
    described = {"type": "detection", "num_queries": 3, "width": 16, "num_layers": 1}
    predictor = Predictor(head_of(described, 48, 2).eval(), "detection", ("cat", "dog"))
    model = replace(orchestrator.load(start.folder), predictor=predictor)
    picture = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(UserError, match=r"least is .*"):
        model.predict_boxes(picture, least=least)
    assert len(model.predict_boxes(picture, least=0)[0].labels) == 3


def test_a_head_that_does_not_fit_is_a_mistake_and_no_traceback(
    start: StartingBackbone, tmp_path: Path
) -> None:
    stage = config()
    save_finetuned(
        stage, start, LABELS, exported(stage, start, tmp_path / "e.safetensors"), tmp_path / "model"
    )
    record = json.loads((tmp_path / "model/config.json").read_text())
    record["extra"]["head"]["classes"].append("elk")
    (tmp_path / "model/config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"head\.safetensors does not fit its description"):
        orchestrator.load(tmp_path / "model")
    record["extra"]["head"]["type"] = "clairvoyance"
    (tmp_path / "model/config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="knows no head of type 'clairvoyance'"):
        orchestrator.load(tmp_path / "model")
    record["extra"]["head"] |= {"type": "classification", "classes": "cde"}
    (tmp_path / "model/config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="`classes` of the head is 'cde'; it is a list"):
        orchestrator.load(tmp_path / "model")


@pytest.mark.parametrize("mode", ["frozen", "lora", "full"])
def test_a_network_of_transformers_is_tuned_and_loads_again(mode: str, index: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    net = Dinov2Model(tiny_dinov2()).eval()
    net.save_pretrained(tmp_path / "dinov2")
    stage = config(network={"transformers": str(tmp_path / "dinov2")}, image_size=16, mode=mode)
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    around = context(index, tmp_path)
    with starting_backbone(stage, around) as begun:
        with torch.no_grad():
            wanted = net(normalise(torch.from_numpy(picture).permute(2, 0, 1)[None])).last_hidden_state
            opened = begun.open()(normalise(torch.from_numpy(picture).permute(2, 0, 1)[None]))
        torch.testing.assert_close(opened.cls, wanted[:, 0])
        file = exported(stage, begun, tmp_path / "e.safetensors")
        save_finetuned(stage, begun, LABELS, file, tmp_path / "model")
        # Once it is written down, the files that it came from are not asked again.
        with starting_backbone(stage, around) as again:
            assert again.folder == begun.folder
    model = orchestrator.load(tmp_path / "model")
    assert model.predict(picture).probabilities.sum() == pytest.approx(1.0)
    same = np.allclose(model.features(picture).cls, wanted[:, 0].numpy(), rtol=1e-4, atol=1e-5)
    assert same == (mode == "frozen")


@pytest.mark.parametrize(
    ("lora", "said", "where"),
    [
        ({"targets": ["q_proj"]}, "no linear layer is meant by the target 'q_proj'", "targets"),
        ({"rank": 50}, "rank 50 is more than the smaller side", "rank"),
    ],
)
def test_adapters_that_do_not_fit_are_told_before_the_first_step(
    lora: dict[str, Any], said: str, where: str, index: Path, start: StartingBackbone, tmp_path: Path
) -> None:
    stage = config(mode="lora", lora=lora, **{"from": str(start.folder)})
    with pytest.raises(UserError, match=said) as caught, starting_backbone(stage, context(index, tmp_path)):
        pass
    assert caught.value.where == f"stages.tune.lora.{where}"


def test_a_size_that_the_backbone_cannot_take_is_told_before_the_first_step(
    index: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    save_pretrained(tmp_path / "a/model", build("vit_femto").state_dict(), "vit_femto", {"image_size": 16})
    with (
        pytest.raises(UserError, match="image_size 20 is not a multiple of the backbone's patch size 8"),
        starting_backbone(config(image_size=20), context(index, tmp_path, backbone=tmp_path / "a")),
    ):
        pass


@pytest.mark.parametrize("extra", [{"image_size": size} for size in ("abc", 10**9, -8, True, [16], 16.5, 0)])
def test_a_size_that_weights_from_anywhere_say_is_one_or_a_mistake(
    extra: dict[str, Any], start: StartingBackbone, index: Path, tmp_path: Path
) -> None:
    record = json.loads((start.folder / "config.json").read_text())
    (start.folder / "config.json").write_text(json.dumps(record | {"extra": extra}))
    stage = Finetune.model_validate({**config().model_dump(exclude_unset=True), "from": str(start.folder)})
    told = pytest.raises(UserError, match=r"image_size in the config\.json of .* is ")
    with told as caught, starting_backbone(stage, context(index, tmp_path)):
        pass
    assert caught.value.where == "stages.tune.from"


def test_the_best_step_is_the_first_of_the_best() -> None:
    stage = config(steps=5, validate_every=2)
    assert stage.validation_steps() == (2, 4, 5)
    looks: list[dict[str, Any]] = [
        {"step": step, "metrics": {"accuracy": value}} for step, value in ((2, 0.4), (4, 0.6), (5, 0.6))
    ]
    assert stage._best(looks) == 4
    assert stage._best([]) == 5
    looks[0]["metrics"]["accuracy"] = float("nan")
    assert stage._best(looks) == 4, "what is no number is not the best"


@pytest.mark.parametrize("task", ["segmentation", "depth", "detection"])
def test_the_other_examples_are_whole_pipelines(task: str) -> None:
    loaded = load(ROOT / f"conf/examples/finetune_{task}.yaml", needs_data=False)
    stages = [stage for stage in loaded.spec.stages.values() if isinstance(stage, Finetune)]
    assert {stage.task.type for stage in stages} == {task}
    assert not graph_errors(loaded)


def test_the_example_is_a_whole_pipeline() -> None:
    loaded = load(ROOT / "conf/examples/finetune_classification.yaml", needs_data=False)
    stage = loaded.spec.stages["groups"]
    assert isinstance(stage, Finetune)
    assert stage.mode == "lora"
    assert stage.models() == {"": "model"}
    assert loaded.spec.stages["publish"].needs == ("groups",)
    assert not graph_errors(loaded)


# --- a value for every pixel ------------------------------------------------------------------------------------


def test_segmentation_is_measured_as_scikit_learn_and_evaluate_do() -> None:
    rng = np.random.default_rng(0)
    logits, true = rng.normal(0, 1, (5, 4, 6, 7)), rng.integers(-1, 3, (5, 6, 7))
    weights = np.array([1, 1, 0, 1, 1], np.float32)  # the third only pads
    goal, sums = SegmentationGoal(4, 16, 0), torch.zeros(12, dtype=torch.float64)
    for rows in (slice(0, 2), slice(2, 5)):
        tensors = {"classes": torch.from_numpy(true[rows]), "weights": torch.from_numpy(weights[rows])}
        sums = sums + goal.sums(torch.from_numpy(logits[rows]), tensors)
    there = (true >= 0) & (weights > 0)[:, None, None]
    guess = logits.argmax(axis=1)
    figures = goal.figures(sums)
    wanted = jaccard_score(true[there], guess[there], average="macro")
    assert figures["mean_iou"] == pytest.approx(wanted)
    assert figures["pixel_accuracy"] == pytest.approx((true[there] == guess[there]).mean())
    parts = iou_parts(np.where(there, guess, 0), np.where(there, true, -1), 4)
    assert figures["mean_iou"] == pytest.approx(float(mean_iou(parts[None])[0]))


def test_depth_is_measured_by_the_formulas() -> None:
    rng = np.random.default_rng(0)
    guess, true = rng.uniform(1, 9, (4, 5, 6)), rng.uniform(1, 9, (4, 5, 6))
    true[0, :2] = 0
    weights = np.array([1, 1, 1, 0], np.float32)
    goal, sums = DepthGoal(0.5, 0.1, 10.0, None, 16, 0), torch.zeros(4, dtype=torch.float64)
    for rows in (slice(0, 1), slice(1, 4)):
        tensors = {"depth": torch.from_numpy(true[rows]), "weights": torch.from_numpy(weights[rows])}
        sums = sums + goal.sums(torch.from_numpy(np.log(guess[rows])), tensors)
    there = (true > 0) & (weights > 0)[:, None, None]
    g, t = guess[there], true[there]
    assert goal.figures(sums) == pytest.approx(
        {
            "rmse": np.sqrt(mean_squared_error(t, g)),
            "delta_1": (np.maximum(g / t, t / g) < 1.25).mean(),
            "relative_error": (np.abs(g - t) / t).mean(),
        }
    )


def masks(folder: Path, values: Any = lambda number: number % 2, size: tuple[int, int] = (20, 24)) -> Path:
    """12 pictures of noise and masks of one value and, in a corner, 5."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(12):
        cv2.imwrite(str(folder / f"images/{number}.png"), rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
        mask = np.full(size, values(number), np.uint8)
        mask[:4, :4] = 5
        cv2.imwrite(str(folder / f"masks/{number}.png"), mask)
    return folder


def dense(path: Path, **more: Any) -> Finetune:
    split = {"by": "hash", "near_duplicate": 1.0}
    return config(task={"type": "segmentation", "data": {"path": str(path), "split": split, **more}})


def test_mistakes_of_a_data_set_are_told_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 10x8 pixels, and its picture .* 24x20"):
        dense(masks(tmp_path / "small", size=(8, 10))).check()
    turned = masks(tmp_path / "turned")
    exif = Image.Exif()
    exif[0x0112] = 6  # the picture is seen on its side, its mask is not
    for picture in (turned / "images").iterdir():
        with Image.open(picture) as opened:
            opened.save(picture, exif=exif)
    with pytest.raises(UserError, match=r"has 24x20 pixels, and its picture .* 20x24"):
        dense(turned).check()

    def said(stage: Finetune) -> str:
        with pytest.raises(UserError) as caught, indexed(stage, context(tmp_path, tmp_path)) as found:
            stage.labelled(context(tmp_path, tmp_path), ImageIndex.load(found.folder))
        return caught.value.what

    one = masks(tmp_path / "one", lambda number: 5)
    assert said(dense(one)) == "the masks of the training split have only the class 5"
    assert said(dense(one, ignore=5)) == "no pixel of the masks of the training split counts"
    other = masks(tmp_path / "other", lambda number: number)
    assert "have classes that those of train lack" in said(dense(other))
    gone = dense(tmp_path / "gone")
    assert gone.files()["task.data.path"] == (tmp_path / "gone/images",), "which plan tells as missing"
    with pytest.raises((ValidationError, UserError), match="has a data set of its own"):
        config(task={"type": "segmentation", "data": {"path": "x"}}, split={"seed": 1})
    with pytest.raises((ValidationError, UserError), match="nearest 20 is not below max_depth 10"):
        config(task={"type": "depth", "data": {"path": "x"}, "nearest": 20})


def test_depth_of_no_pixel_has_no_figures_and_no_traceback() -> None:
    figures = DepthGoal(0.5, 0.1, 10.0, None, 16, 0).figures(torch.zeros(4, dtype=torch.float64))
    assert set(figures) == {"rmse", "delta_1", "relative_error"}
    assert all(np.isnan(value) for value in figures.values())


def test_more_objects_than_queries_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = [{"id": number, "file_name": f"{number}.png", "width": 24, "height": 20} for number in range(12)]
    boxes = [{"image_id": each["id"], "category_id": 1, "bbox": [2, 2, 9, 9]} for each in images]
    record = {
        "images": images,
        "annotations": [*boxes, boxes[3], boxes[3]],
        "categories": [{"id": 1, "name": "dog"}],
    }
    masks(tmp_path / "data")
    (tmp_path / "boxes.json").write_text(json.dumps(record))
    stage = config(
        task={"type": "detection", "num_queries": 2, "data": {"path": str(tmp_path / "data/images"),
              "annotations": str(tmp_path / "boxes.json"), "split": {"by": "hash", "near_duplicate": 1.0}}}
    )  # fmt: skip
    with caplog.at_level("WARNING"), indexed(stage, context(tmp_path, tmp_path)) as found:
        stage.labelled(context(tmp_path, tmp_path), ImageIndex.load(found.folder))
    assert "1 of 12 pictures have more than 2 objects, up to 3" in caplog.text


def test_a_category_with_the_name_of_another_is_a_mistake(tmp_path: Path) -> None:
    """Also if no box has it: classes are known by their names alone, and boxes would be taken for the other's."""
    images = [{"id": number, "file_name": f"{number}.png", "width": 24, "height": 20} for number in range(12)]
    boxes = [{"image_id": each["id"], "category_id": 1, "bbox": [2, 2, 9, 9]} for each in images]
    names = [{"id": 1, "name": "dog"}, {"id": 2, "name": "dog"}]
    masks(tmp_path / "data")
    record = {"images": images, "annotations": boxes, "categories": names}
    (tmp_path / "boxes.json").write_text(json.dumps(record))
    stage = config(
        task={"type": "detection", "data": {"path": str(tmp_path / "data/images"),
              "annotations": str(tmp_path / "boxes.json"), "split": {"by": "hash", "near_duplicate": 1.0}}}
    )  # fmt: skip
    told = pytest.raises(UserError, match="two categories are called 'dog'")
    with told, indexed(stage, context(tmp_path, tmp_path)) as found:
        stage.labelled(context(tmp_path, tmp_path), ImageIndex.load(found.folder))


def test_a_task_with_a_data_set_of_its_own_takes_no_index(tmp_path: Path) -> None:
    assert [one.role for one in dense(tmp_path).wants()] == ["backbone"]
    assert [one.role for one in config().wants()] == ["index", "backbone"]
    stage = dense(masks(tmp_path / "data"))
    assert len(stage.files()["task.data.path"]) == 24, "pictures and masks are part of the key"


# --- what others make of it -------------------------------------------------------------------------------------


def test_it_is_evaluated_on_photos_whose_labels_it_did_not_learn() -> None:
    split = {"by": "hash", "seed": 3}
    tuned = config(split=split, network={"transformers": "x"})

    def said(**more: Any) -> list[str]:
        stage = Evaluate.model_validate({"kind": "evaluate", **more})
        around = PlanContext({"finetuned": tuned}, photos=ImageCount(9, 0, 9), names={"finetuned": "groups"})
        return [f"{error.where}: {error.what}" for error in stage.preflight(around)]

    assert said(split=split) == []
    for other in ({}, {"split": {"by": "hash"}}):
        assert said(**other) == [
            "split: groups learned the labels of its training photos, and the split here is another one"
        ]
    assert Evaluate(kind="evaluate").scored("finetune") == ("knn",)


@pytest.mark.heavy
def test_it_is_evaluated_and_published_like_any_model(
    index: Path, start: StartingBackbone, tmp_path: Path, empty_database: Path
) -> None:
    stage = config(mode="lora", split={"near_duplicate": 1.0})
    file = exported(stage, start, tmp_path / "e.safetensors")
    save_finetuned(stage, start, LABELS, file, tmp_path / "tuned/model")
    (tmp_path / "tuned/history.json").write_text("[]")
    evaluate = Evaluate.model_validate({"kind": "evaluate", "split": {"near_duplicate": 1.0}})
    around = context(index, tmp_path, finetuned=tmp_path / "tuned")
    around.out.mkdir()
    evaluate.run(around)
    table = json.loads((around.out / "table.json").read_text())
    names = [row["name"] for row in table["knn"]["rows"]]
    assert names == ["majority group", "raw pixels", "random vit_femto", "finetune"]

    shutil.copyfile(empty_database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    made = artifact("finetune", "e" * 64, tmp_path / "tuned", {"index": "c" * 64})
    (tmp_path / "publish/out").mkdir(parents=True)
    with Tracking(uri, "tuned", tmp_path / "spool") as tracking:
        now = registry_context(
            tmp_path / "publish",
            "food",
            tracking.run("publish"),
            {"models.groups": made},
            {"models.groups": stage},
        )
        assert Publish(kind="publish").run(now) == {"published": 1.0}
    pulled = download.pull("food-groups@champion", tmp_path / "pulled", uri)
    model = orchestrator.load(pulled)
    assert model.classes == LABELS
    assert model.predict(np.zeros((20, 20, 3), np.uint8)).labels[0] in LABELS


@pytest.mark.heavy
def test_a_network_with_batch_norm_and_a_mean_of_its_own_is_tuned_as_it_came(
    index: Path, tmp_path: Path
) -> None:
    """EfficientNet-Lite0: its statistics stay, and its mean and deviation travel with the model."""
    torch.manual_seed(3)
    net = efficientnet.lite0().eval()
    for name, buffer in net.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
    torch.save(net.state_dict(), tmp_path / "lite0.pth")
    stage = config(
        network={
            "module": "orchestrator.models.efficientnet:lite0", "weights": str(tmp_path / "lite0.pth"),
            "mean": efficientnet.MEAN, "std": efficientnet.STD,
        },
        mode="full", image_size=64,
    )  # fmt: skip
    assert stage.modules() == ("orchestrator.models.efficientnet:lite0",)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    x = (torch.from_numpy(picture).permute(2, 0, 1)[None] / 255 - efficientnet.MEAN[0]) / efficientnet.STD[0]
    around = replace(context(index, tmp_path), modules=stage.modules())
    with starting_backbone(stage, around) as start:
        task = FinetuneTask(stage, start, LABELS, 0)
        net_in_training = task.build("cpu").trainable.train()
        assert not any(
            part.training for part in net_in_training.modules() if isinstance(part, nn.BatchNorm2d)
        )
        images = torch.from_numpy(picture).permute(2, 0, 1)[None]
        with torch.no_grad():
            wanted = net(x).flatten(2).mean(dim=2)
            seen = net_in_training.backbone(normalise(images, net_in_training.backbone)).cls
        torch.testing.assert_close(seen, wanted, rtol=1e-4, atol=1e-4)
        trained = {name for name, param in net_in_training.named_parameters() if param.requires_grad}
        assert "backbone.net._conv_stem.weight" in trained
        assert not any("_fc" in name for name in trained), "the features do not depend on its classifier"
        file = exported(stage, start, tmp_path / "e.safetensors")
        save_finetuned(stage, start, LABELS, file, tmp_path / "model")
    model = orchestrator.load(tmp_path / "model", trust_module="orchestrator")
    state = model.module.state_dict()
    torch.testing.assert_close(state["net._bn0.running_mean"], net._bn0.running_mean)
    record = json.loads((tmp_path / "model/config.json").read_text())
    assert record["mean"] == pytest.approx(efficientnet.MEAN)
    assert model.predict(picture).probabilities.sum() == pytest.approx(1.0)
