"""`finetune`: its labels and mistakes, what is computed, and what its model is to others."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    log_loss,
)
from transformers import Dinov2Model

from orchestrator.config.schedules import Optimizer
from orchestrator.data.index import ImageIndex
from orchestrator.errors import UserError
from orchestrator.models import (
    build,
    layer_depths,
)
from orchestrator.models.cost import forward_flops
from orchestrator.models.wrapped_backbone import WrappedBackbone
from orchestrator.stages.base import ImageCount, PlanContext
from orchestrator.stages.compute_cost import workloads
from orchestrator.stages.finetune.class_goal import ClassGoal
from orchestrator.stages.finetune.config import Finetune
from orchestrator.stages.finetune.start import StartingBackbone
from orchestrator.stages.finetune.task import FinetuneTask, TunedNet, block_depths, learning_rates
from orchestrator.stages.ssl.pretrain import Pretrain

from .finetuning import LABELS, config, labelled, relabelled, tiny_dinov2

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
    metrics = goal.metrics(sums)
    said = logits[real].argmax(axis=1)
    probabilities = np.exp(logits[real]) / np.exp(logits[real]).sum(axis=1, keepdims=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where a class is said that is not there
        balanced = balanced_accuracy_score(classes[real], said)
    assert metrics == pytest.approx(
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


def test_adapters_have_the_learning_rate_of_their_layer(start: StartingBackbone) -> None:
    decayed = {"lr": {"peak": 1e-3}, "layer_decay": 0.5}
    targets = ["attention", "mlp"]
    modules = FinetuneTask(
        config(mode="lora", lora={"rank": 2, "targets": targets}, optimizer=decayed), start, LABELS, 0
    ).build("cpu")
    trained = {name for name, param in modules.trainable.named_parameters() if param.requires_grad}
    rates = {name: modules.lr_scales.get(name, 1.0) for name in trained}
    assert {rate for name, rate in rates.items() if ".blocks.0." in name} == {0.25}
    assert {rate for name, rate in rates.items() if ".blocks.1." in name} == {0.5}
    assert {rate for name, rate in rates.items() if name.startswith("head.")} == {1.0}
    assert sum(".lora_" in name for name in trained) == 2 * 2 * 4


def test_vectors_are_trained_with_adapters_but_not_what_nothing_depends_on(start: StartingBackbone) -> None:
    task = FinetuneTask(config(mode="lora", lora={"rank": 2, "vectors": True}), start, LABELS, 0)
    modules = task.build("cpu")
    plain = dict(start.open().named_parameters())
    trained = {
        name.removeprefix("backbone.").replace(".base.", ".")
        for name, param in modules.trainable.named_parameters()
        if param.requires_grad and name.startswith("backbone.") and ".lora_" not in name
    }
    vectors = {name for name, param in plain.items() if param.ndim == 1}
    assert trained == {name for name in vectors if not name.startswith("local_norm.")}


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
